"""A command speaks soon, also while it only imports what it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher.conftest import ROOT, environment

# {data}: a folder of images and shards; {run}: a run, as far as it is looked at before an import.
COMMANDS = [
    "pack digits --out {out}",
    "pack torchvision MNIST --out {out}",
    "doctor --cluster --recipe recipes/digits_scl.yaml",
    "train --recipe recipes/digits_scl.yaml",
    "forecast --recipe recipes/digits_scl.yaml",
    "sweep recipes/paper/lambda.yaml",
    "retrain {run} --weights new",
    "report {run}",
    "eval {run}",
    "predict {run} {data}/image.png",
    "export {run} --format onnx --out {out}",
    "bench {run}",
    "shrink {run} --by votes --share 10% --out {out}",
    "checkpoint convert {run}/checkpoints {out}.safetensors",
]
# All at once, forked from a process that has imported nothing. What is heavy takes two seconds to
# import there, and is missing then.
_PROGRAM = """
import json, os, shlex, sys, time

class Slow:
    def find_spec(self, name, *_):
        if name in {"torch", "matplotlib", "sklearn"}:
            time.sleep(2)
            sys.stderr.flush()
            os._exit(77)

commands = json.load(sys.stdin)
from launcher import cli
sys.meta_path.insert(0, Slow())
children = []
for number, command in enumerate(commands):
    children.append(os.fork())
    if not children[-1]:
        file = os.open(f"{sys.argv[1]}/{number}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1), os.dup2(file, 2)
        os._exit(cli.main(shlex.split(command)))
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and output of each command."""
    folder = tmp_path_factory.mktemp("said")
    places = {"data": folder / "data", "run": folder / "run", "out": folder / "out"}
    (places["data"] / "class").mkdir(parents=True)
    (places["data"] / "image.png").touch()
    step = places["run"] / "checkpoints/step-00000001"
    step.mkdir(parents=True)
    for file in ("recipe.yaml", "model.safetensors", "metrics.jsonl", "summary.json"):
        (places["run"] / file).write_text("{}" if file == "summary.json" else "")
    (step / "manifest.json").write_text("{}")
    ended = subprocess.run(
        [sys.executable, "-c", _PROGRAM, folder],
        input=json.dumps([command.format(**places) for command in COMMANDS]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr
    texts = [Path(folder, str(number)).read_text() for number in range(len(COMMANDS))]
    return dict(zip(COMMANDS, zip(json.loads(ended.stdout), texts, strict=True), strict=True))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_speaks_while_it_imports(command: str, said: dict[str, tuple[int, str]]) -> None:
    code, text = said[command]
    assert code == 77, text
    assert text.strip()
