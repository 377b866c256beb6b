"""What the documents say can be done, can be done."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

from launcher import cli
from launcher.models import model_on_meta
from launcher.recipe.load import load_recipe
from launcher.run.optimizer import build_optimizer
from tests import forkserver
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]


def commands(path: Path) -> list[list[str]]:
    """The words of every `scl …` command in the indented and inline code of a document."""
    text = path.read_text()
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    found = []
    for code in [*lines, *re.findall(r"`([^`\n]+)`", text)]:
        # What is written to a file is a command of the shell.
        code = code.partition(" > ")[0]
        words = shlex.split(code, comments=True) if re.match(r"(\.venv/bin/)?scl \w", code) else []
        if words:
            found.append(words[1:])
    return found


def test_the_two_lines_in_ones_own_loop() -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code) == 1
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(256, 64, generator=generator)
    labels = images[:, :10].argmax(1)
    names = {"batches": [(images, labels)] * 1000}
    exec(code[0], names)
    model, live = names["model"], names["live"]
    assert isinstance(model, torch.nn.Module) and isinstance(live, int)
    weights = [layer.weight for layer in (model[0], model[2])]  # type: ignore[index]
    assert live == sum(int(torch.count_nonzero(w)) for w in weights)
    assert live < sum(w.numel() for w in weights) / 2
    assert (model(images).argmax(1) == labels).float().mean() > 0.9


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_the_loop_under_fsdp2() -> None:
    """As documented, in a process of its own, as one rank of one."""
    fsdp, semi_structured = blocks("docs/scaling.md", "python")
    batches = "import torch\nbatches = [(torch.randn(8, 64), torch.arange(8))] * 3\n"
    shown = "\nprint(sum(int(m.sum()) for m in masks.values()))\n"
    world = {"RANK": "0", "WORLD_SIZE": "1"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    result = forkserver.run(
        [sys.executable, "-c", batches + fsdp + shown],
        cwd=ROOT,
        env=os.environ | world,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == 64 * 100 + 100 * 10, "3 updates kill nothing yet"
    # Needs a GPU with sparse tensor cores; at least it is Python.
    compile(semi_structured, "docs/scaling.md", "exec")


def test_the_granularities_of_the_document_fit_resnet50() -> None:
    [text] = blocks("docs/scaling.md", "yaml")
    values = yaml.safe_load(text)["method"]["granularity"]
    recipe = load_recipe(ROOT / "recipes/resnet50_scl.yaml", [f"method.granularity={values}"])
    model, image = model_on_meta(recipe.model, num_classes=1000, in_chans=3, image_size=64)
    [group, *_] = build_optimizer(
        recipe.method.for_run(recipe.schedule, 1000), recipe.optim, model, image
    ).param_groups
    granularity = dict(zip(group["names"], group["granularity"], strict=True))
    assert granularity["fc.weight"] == "weight" and granularity["layer1.0.conv2.weight"] == "kernel"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_scl_command_is_understood(path: Path) -> None:
    for words in commands(path):
        if words[-1] in {"…", "train"} or set(words) & {"DIR", "…"}:
            continue
        if all(re.fullmatch("[a-z]+", word) for word in words):
            # Mentioned by its name alone: there must be such a command.
            with pytest.raises(SystemExit) as ended:
                cli.parser().parse_args([*words, "--help"])
            assert ended.value.code == 0, words
            continue
        options = cli.parser().parse_args(words)
        # What lies in runs/ another command writes, and `scl init` what lies in no folder.
        if getattr(options, "recipe", None) is not None and options.recipe.parts[0] == "recipes":
            assert (ROOT / options.recipe).is_file(), words
            # A method of somebody else's package is not importable here.
            if words[0] == "train" and not re.search("=[a-z]+:[A-Z]", " ".join(words)):
                load_recipe(ROOT / options.recipe, options.overrides)


def test_there_are_commands_to_check() -> None:
    assert len(commands(ROOT / "README.md")) >= 5


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_ci_calls_the_test_command_of_the_readme() -> None:
    assert "    make test\n" in (ROOT / "README.md").read_text()
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("exec make test")
    makefile = (ROOT / "Makefile").read_text()
    assert "\ntest:" in makefile and "\ndemo:" in makefile


def test_the_augmentation_of_the_document_is_a_recipe() -> None:
    [text] = blocks("docs/augmentation.md", "yaml")
    overrides = [
        f"{section}.{key}={value}"
        for section, keys in yaml.safe_load(text).items()
        for key, value in keys.items()
    ]
    recipe = load_recipe(ROOT / "recipes/resnet50_scl.yaml", overrides)
    assert recipe.data.mixing and recipe.data.training_size(0, 100) == 128
    written = {key for section in yaml.safe_load(text).values() for key in section}
    drawn = {"augment", "crop_scale", "crop_ratio", "interpolation", "hflip", "randaugment"}
    assert written >= drawn | {"random_erasing", "mixup", "cutmix", "progressive"}


def test_the_loop_with_drawn_gates() -> None:
    [code] = blocks("docs/methods.md", "python")
    torch.manual_seed(0)
    images = torch.randn(256, 64)
    names = {
        "torch": torch,
        "model": torch.nn.Sequential(
            torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10)
        ),
        "loss_of": torch.nn.functional.cross_entropy,
        "images": images,
        "batches": [(images, images[:, :10].argmax(1))] * 300,
    }
    exec(code, names)
    model, optimizer = names["model"], names["optimizer"]
    live = sum(optimizer.live_connections().values())  # type: ignore[attr-defined]
    assert 0 < live < 0.9 * (64 * 100 + 100 * 10)
    weights = [layer.weight for layer in (model[0], model[2])]  # type: ignore[index]
    assert live == sum(int(torch.count_nonzero(w)) for w in weights)
