"""What each command imports: a user waits for every heavy module before anything is said."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from launcher.commands import SUMMARIES
from tests.launcher.conftest import ROOT, environment

HEAVY = (
    *("PIL", "deepspeed", "huggingface_hub", "matplotlib", "numpy", "pandas", "pydantic"),
    *("rich.table", "scipy", "sklearn", "sympy", "timm", "torch", "torch._dynamo"),
    *("torchvision", "wandb", "webdataset", "yaml"),
)
RECIPE = {"pydantic", "yaml"}
DIGITS = "--recipe recipes/digits_scl.yaml"
# Command → exit code, and those of HEAVY that it may import before it has ended.
ALLOWED: dict[str, tuple[int, set[str]]] = {
    "scl --help": (0, set()),
    **{f"scl {name} --help": (0, set()) for name in SUMMARIES},
    "scl": (2, set()),
    "scl nothing": (2, set()),
    "scl train --nothing": (2, set()),
    "scl checkpoint ls --nothing": (2, set()),
    "scl recipe": (0, RECIPE),
    "scl recipe --yaml scl": (0, RECIPE),
    "scl recipe --schema": (0, RECIPE),
    "scl completion bash": (0, RECIPE),
    "scl train --recipe none.yaml": (2, RECIPE),
    f"scl train {DIGITS} --set method.lamb=1": (2, RECIPE),
    f"scl train {DIGITS} --ranks 0": (2, RECIPE),
    "scl sweep none.yaml": (2, RECIPE),
    "scl forecast --recipe none.yaml": (2, RECIPE),
    f"scl forecast {DIGITS} --share 2": (2, RECIPE),
    f"scl doctor --cluster {DIGITS} --set method.lamb=1": (2, RECIPE),
    "scl doctor": (2, RECIPE),
    "scl doctor none": (2, RECIPE),
    "scl retrain none --weights new": (2, RECIPE),
    "scl init none": (2, RECIPE),
    "scl predict none image.png": (2, RECIPE),
    "scl eval none": (2, RECIPE),
    "scl report none": (2, RECIPE),
    "scl compare none": (2, RECIPE | {"rich.table"}),
    "scl checkpoint ls none": (2, RECIPE | {"rich.table"}),
    "scl checkpoint verify none": (2, RECIPE),
    "scl checkpoint prune none": (2, RECIPE),
    "scl checkpoint convert none model.safetensors": (2, RECIPE),
    "scl export none --format nothing --out none": (2, RECIPE),
    "scl export none --format onnx --out none": (2, RECIPE),
    "scl shrink none --by votes --out none": (2, RECIPE),
    "scl shrink none --by votes --share 10% --out none": (2, RECIPE),
    "scl bench none": (2, RECIPE),
    "scl bench none --batch 0": (2, RECIPE),
    "scl pack imagefolder none --out none": (2, RECIPE),
    # Nor these PyTorch, before they write or read a batch.
    "import launcher.start.look": (0, {"PIL", "numpy", "pydantic"}),
    "import data.packing.pack": (0, {"PIL", "numpy", "pydantic"}),
    "import data.packing.adopt": (0, {"PIL", "numpy", "pydantic"}),
    "import data.shards.doctor": (0, {"PIL", "numpy", "pydantic"}),
    # All that `scl train` needs before it knows the model: none of these does a thing for our own.
    "import launcher.start.train": (0, RECIPE | {"PIL", "numpy", "rich.table", "sympy", "torch"}),
}
# Each command in a process of its own, all of them forked from one that has imported nothing.
_PROGRAM = """
import importlib, json, os, shlex, sys
commands, heavy = json.load(sys.stdin)
from launcher import cli
for command in commands:
    pid = os.fork()
    if pid:
        assert os.waitpid(pid, 0)[1] == 0
        continue
    output = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    program, *words = shlex.split(command)
    try:
        code = importlib.import_module(*words) and 0 if program == "import" else cli.main(words)
    except SystemExit as ended:
        code = ended.code
    found = [name for name in heavy if name in sys.modules]
    os.write(output, (json.dumps([command, code, found]) + "\\n").encode())
    os._exit(0)
"""


@pytest.fixture(scope="module")
def seen() -> dict[str, tuple[int, set[str]]]:
    """Exit code and heavy modules of each command."""
    ended = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=json.dumps([[*ALLOWED], HEAVY]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr
    lines = map(json.loads, ended.stdout.splitlines())
    return {command: (code, set(found)) for command, code, found in lines}


@pytest.mark.parametrize("command", ALLOWED)
def test_a_command_imports_what_it_needs(
    command: str, seen: dict[str, tuple[int, set[str]]]
) -> None:
    (code, allowed), (ended, found) = ALLOWED[command], seen[command]
    assert ended == code
    assert found <= allowed


def test_each_command_has_a_module_of_its_name() -> None:
    folder = ROOT / "launcher" / "commands"
    assert {file.stem for file in folder.glob("*.py")} - {"__init__"} == set(SUMMARIES)
