from __future__ import annotations

import io
import json
import math
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from launcher.folder import results
from launcher.folder.results import ReportError
from launcher.reports import picture, report
from tests import forkserver

FIVE = {"conv1": 288, "conv2": 18432, "conv3": 73728, "fc1": 294912, "fc2": 2560}
MANY = {f"layer{i // 9}.{i % 9}.downsample.conv": 2_359_296 for i in range(60)}


def _run_dir(
    root: Path,
    layers: dict[str, int] = FIVE,
    *,
    epochs: int = 40,
    density: float = 0.03,
    method: str = "scl",
    name: str = "digits-cnn",
) -> Path:
    """A finished run of 20 logged steps an epoch."""
    root.mkdir(exist_ok=True)
    lines = []
    for i in range(1, 20 * epochs + 1):
        progress = i / (20 * epochs)
        accuracy = 0.99 - 0.89 * math.exp(-9 * progress)
        line = {"step": i, "epoch": i / 20, "time": i, "train/top1": accuracy}
        line["connections/density"] = density + (1 - density) * math.exp(-9 * progress)
        if method == "dense":
            del line["connections/density"]
        if i % 20 == 0:
            line["val/top1"] = accuracy - 0.002
        lines.append(json.dumps(line) + "\n")
    (root / "metrics.jsonl").write_text("".join(lines))
    live = {layer: round(count * density) for layer, count in layers.items()}
    rows = [
        f'{layer},"64,32,3,3",{count},{live[layer]},{live[layer] / count},{9 * count},'
        f"{9 * live[layer]}\n"
        for layer, count in layers.items()
    ]
    header = "layer,shape,connections,live,density,macs_dense,macs\n"
    (root / "layers.csv").write_text(header + "".join(rows))
    total, kept = sum(layers.values()), sum(live.values())
    summary = {
        "name": name,
        "method": method,
        "top1": 0.9885,
        "top5": 0.9991,
        "density": kept / total,
        "live": kept,
        "connections": total,
        "macs": 9 * kept,
        "macs_dense": 9 * total,
        "parameters": kept + 1000,
        "epochs": epochs,
        "train_seconds": 3754.2,
        "world_size": 2,
        "artifacts": {"model": "/runs/a/model.safetensors", "layers": "/runs/a/layers.csv"},
    }
    (root / "summary.json").write_text(json.dumps(summary))
    return root


def _figure(run_dir: Path) -> Any:
    run = results.read_run(run_dir)
    figure = picture._figure(run, str(run.summary.get("name", "x")))
    figure.canvas.draw()
    return figure


def _texts(figure: Any) -> list[Any]:
    texts = list(figure.texts)
    for axes in figure.axes:
        left_title = axes.title if axes.title.get_text() else axes._left_title
        texts += [left_title, *axes.texts, axes.xaxis.label]
        texts += [*axes.get_yticklabels(), *axes.get_xticklabels()]
    return [text for text in texts if text.get_visible() and text.get_text()]


def _words(figure: Any) -> list[str]:
    return [text.get_text() for text in _texts(figure)]


# --- the picture -------------------------------------------------------------------------------


def test_the_picture_has_readme_size_and_colours(tmp_path: Path) -> None:
    path = picture.draw(_run_dir(tmp_path))
    assert path == tmp_path / "summary.png"
    with Image.open(path) as image:
        assert image.size == (1400, 520)
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
    for hexadecimal in (picture._ACCURACY, picture._DENSITY, picture._TRAIN):
        assert tuple(bytes.fromhex(hexadecimal[1:])) in colours
    assert not list(tmp_path.glob(".tmp-*"))


def test_the_picture_grows_with_the_layers(tmp_path: Path) -> None:
    with Image.open(picture.draw(_run_dir(tmp_path, MANY))) as image:
        assert image.width == 1400
        assert 900 < image.height < 1300


def test_the_picture_says_what_the_run_says(tmp_path: Path) -> None:
    words = _words(_figure(_run_dir(tmp_path)))
    for expected in (*FIVE, "total", "digits-cnn", "val 98.8 %", "train 99.0 %", "3.01 %"):
        assert expected in words
    assert "553 / 18,432" in words
    assert "11,698 / 389,920" in words
    assert words.count("3.00 %") == 4
    assert any("11,698 of 389,920" in word and "33.3× fewer" in word for word in words)


def test_lines_hold_the_series(tmp_path: Path) -> None:
    accuracy, density, bars = _figure(_run_dir(tmp_path, epochs=4)).axes
    training, validation = accuracy.get_lines()
    assert list(validation.get_xdata()) == [1, 2, 3, 4]
    assert validation.get_ydata()[-1] == pytest.approx(0.99 - 0.89 * math.exp(-9) - 0.002)
    # One mean for each epoch, not 80 batches.
    assert list(training.get_xdata()) == [1, 2, 3, 4]
    first = [0.99 - 0.89 * math.exp(-9 * i / 80) for i in range(1, 21)]
    assert training.get_ydata()[0] == pytest.approx(sum(first) / 20)
    assert density.get_yscale() == "log"
    assert len(density.get_lines()[0].get_xdata()) == 80
    widths = [patch.get_width() for patch in bars.patches]
    assert widths == pytest.approx([0.03] * 6, abs=0.002)


def test_a_dense_run_is_at_100_percent(tmp_path: Path) -> None:
    figure = _figure(_run_dir(tmp_path, density=1.0, method="dense"))
    assert list(figure.axes[1].get_lines()[0].get_ydata()) == [1.0, 1.0]
    assert _words(figure).count("100 %") >= 8
    assert not any("fewer" in word for word in _words(figure))


@pytest.mark.parametrize("density", [1.0, 0.0004])
@pytest.mark.parametrize("epochs", [1, 40])
@pytest.mark.parametrize("layers", [FIVE, MANY, {"fc": 99_999_999}], ids=["five", "many", "one"])
def test_no_text_overlaps_or_leaves_the_picture(
    tmp_path: Path, layers: dict[str, int], epochs: int, density: float
) -> None:
    figure = _figure(_run_dir(tmp_path, layers, epochs=epochs, density=density))
    boxes = [(text.get_text(), text.get_window_extent()) for text in _texts(figure)]
    width, height = figure.canvas.get_width_height()
    for word, box in boxes:
        assert box.x0 >= 0 and box.x1 <= width, word
        assert box.y0 >= 0 and box.y1 <= height, word
    clashes = [
        (one, other)
        for (one, a), (other, b) in combinations(boxes, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 0 and min(a.y1, b.y1) - max(a.y0, b.y0) > 3
    ]
    assert clashes == []


def test_a_dollar_in_a_name_is_a_dollar(tmp_path: Path) -> None:
    run_dir = _run_dir(tmp_path, {"a$_$b": 10}, density=0.5, name="cost $_{$ [bold]")
    picture.draw(run_dir)
    assert "cost $_{$ [bold]" in _shown(run_dir)


def test_dead_layers_and_a_dead_network(tmp_path: Path) -> None:
    figure = _figure(_run_dir(tmp_path, density=0.0))
    assert "0 / 288" in _words(figure)


# --- runs that are not finished, and folders that are no runs -----------------------------------


def test_a_running_run(tmp_path: Path) -> None:
    run_dir = _run_dir(tmp_path / "young", epochs=2)
    (run_dir / "summary.json").unlink()
    (run_dir / "layers.csv").unlink()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "epoch": 3, "val/top1": null}\n\n[]\n{"step": 100, "ep')
    picture.draw(run_dir)
    shown = _shown(run_dir)
    assert "young" in shown and "98.79 %" in shown
    assert "no layers recorded yet" in _words(_figure(run_dir))
    assert any("val 98.8 %" in word for word in _words(_figure(run_dir)))


def test_a_run_without_a_line_yet(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    picture.draw(tmp_path)
    words = _words(_figure(tmp_path))
    assert "no accuracy recorded yet" in words and "no density recorded yet" in words


@pytest.mark.parametrize("show", [picture.draw, report.table, report.show])
def test_no_run_folder(tmp_path: Path, show: Any) -> None:
    with pytest.raises(ReportError, match="no run folder"):
        show(tmp_path / "absent")
    with pytest.raises(ReportError, match=r"no run folder: it has none of metrics\.jsonl"):
        show(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "{"),
        ("summary.json", "[1]"),
        ("layers.csv", "layer,live\nfc,3\n"),
        ("layers.csv", "layer,shape,connections,live,density,macs_dense,macs\nfc,x,many,1,1,1,1\n"),
    ],
)
def test_an_invalid_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    (_run_dir(tmp_path) / name).write_text(content)
    with pytest.raises(ReportError, match=name) as caught:
        picture.draw(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["- a list", "a: [1"])
def test_a_recipe_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (_run_dir(tmp_path) / "recipe.yaml").write_text(content)
    with pytest.raises(ReportError, match=r"recipe\.yaml") as caught:
        results.read_recipe(tmp_path)
    assert "\n" not in str(caught.value)


def test_series_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (_run_dir(tmp_path) / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ReportError, match=r"metrics\.jsonl cannot be read"):
        report.show(tmp_path)


# --- the table ---------------------------------------------------------------------------------


def _shown(run_dir: Path, dense: dict[str, Any] | None = None) -> str:
    stream = io.StringIO()
    report.show(run_dir, dense, Console(file=stream, width=100, highlight=False))
    return stream.getvalue()


def test_the_table(tmp_path: Path) -> None:
    shown = _shown(_run_dir(tmp_path))
    for expected in (
        "digits-cnn",
        "98.85 %",
        "3.00 % (sparsity 97.00 %)",
        "11,698 of 389,920",
        "105 k of 3.51 M (33.3× fewer)",
        "12,698",
        "1 h 02 min on 2 ranks",
        "/runs/a/model.safetensors",
        "/runs/a/layers.csv",
    ):
        assert expected in shown


def test_beside_the_dense_twin(tmp_path: Path) -> None:
    dense = {"top1": 0.991, "live": 389920, "connections": 389920, "world_size": 1}
    (row,) = [line for line in _shown(_run_dir(tmp_path), dense).splitlines() if "top-1" in line]
    assert "98.85 %" in row and "99.10 %" in row


def test_long_paths_stay_whole(tmp_path: Path) -> None:
    run_dir = _run_dir(tmp_path)
    summary = json.loads((run_dir / "summary.json").read_text())
    long = "/very" * 60 + "/model[1].pt"
    summary["artifacts"] = {"model": long}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    assert long in _shown(run_dir)


def test_a_pipe_gets_plain_text(tmp_path: Path) -> None:
    run_dir = _run_dir(tmp_path)
    code = "import sys; from pathlib import Path; from launcher.reports import report; "
    code += "report.show(Path(sys.argv[1]))"
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", code, str(run_dir)]
    done = forkserver.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "98.85 %" in done.stdout
    assert [c for c in done.stdout if ord(c) < 32 and c != "\n"] == []


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (1.0, "100 %"),
        (0.99999, "100.0 %"),
        (0.123, "12.3 %"),
        (0.0305, "3.05 %"),
        (0.000412, "0.041 %"),
        (0.0, "0 %"),
    ],
)
def test_percentages(share: float, text: str) -> None:
    assert results.percent(share) == text
