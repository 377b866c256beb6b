"""SCL in other people's training loops: each example of docs/library.md is run, as it is shown."""

from __future__ import annotations

import math
import re
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "docs/examples").glob("*.py"))


def run(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs/examples" / name), run_name="__main__")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_the_document_shows_the_file(path: Path) -> None:
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.DOTALL)
    assert path.read_text() in shown


def test_plain_pytorch() -> None:
    names = run("plain_pytorch.py")
    assert names["live"] < 0.25 * (64 * 100 + 100 * 10) and names["top1"] > 0.85
    layers = (names["model"][0], names["model"][2])
    assert sum(int((layer.weight != 0).sum()) for layer in layers) == names["live"]


def test_averaged_model() -> None:
    """Dense by itself, and as sparse as the model it is the average of once masks are applied."""
    names = run("averaged_model.py")
    assert names["dense"] == 64 * 100 + 100 * 10 and names["top1"] > 0.85
    assert names["live"] == sum(names["optimizer"].live_connections().values()) < 0.25 * 7400


def test_lightning() -> None:
    names = run("lightning_module.py")
    assert names["live"] < 0.4 * names["total"] and names["results"]["top1"] > 0.8
    weights = [p for p in names["module"].parameters() if p.ndim > 1]
    assert sum(int((w != 0).sum()) for w in weights) == names["live"]


def test_hugging_face_trainer() -> None:
    """The model knows more than how frequent the letters are."""
    names = run("huggingface_trainer.py")
    text = names["text"]
    frequencies = [count / len(text) for count in Counter(text).values()]
    entropy = -sum(f * math.log(f) for f in frequencies)
    assert names["live"] < 0.5 * names["total"]
    assert names["loss"] < entropy - 0.4
    weights = dict(names["model"].named_parameters())
    learned = names["optimizer"].masks()
    assert sum(int((weights[n] != 0).sum()) for n in learned) == names["live"]
