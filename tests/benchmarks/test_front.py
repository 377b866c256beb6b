"""benchmarks.front: paired runs, lines that survive a kill, differences at equal density."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.front_compare import compared, differences
from benchmarks.front_data import packed
from benchmarks.front_lines import Line, append, read
from benchmarks.front_runs import Run, carry_out, make
from benchmarks.front_tasks import METHODS, TASKS, methods_of, recipe_for
from benchmarks.front_training import train
from data.errors import DataError
from data.packing.pack import pack
from data.sources.source import ArrayReader, Reader, Source
from launcher.errors import UsageError
from launcher.models import model_on_meta
from launcher.run.optimizer import build_optimizer
from tests.launcher.conftest import finish, launch

LINE = Line("magnitude", 0.05, 3, 0.98, 0.1, 0.05, 4.2, "0123abcd", "9 81")


def lines_of(name: str, *points: tuple[float, float]) -> list[Line]:
    return [replace(LINE, name=name, asked=d, density=d, top1=top1) for d, top1 in points]


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "digits.csv"
    assert read(file) == []
    append(file, LINE)
    append(file, replace(LINE, name="scl a=1, b"))
    assert read(file) == [LINE, replace(LINE, name="scl a=1, b")]


def test_what_a_kill_cut_short_is_no_line_and_spoils_none(tmp_path: Path) -> None:
    file = tmp_path / "digits.csv"
    append(file, LINE)
    append(file, replace(LINE, split=4))
    file.write_bytes(file.read_bytes()[:-7])
    assert read(file) == [LINE]
    append(file, replace(LINE, split=5))
    assert read(file) == [LINE, replace(LINE, split=5)]


def test_another_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "digits.csv"
    file.write_text("setting,split\nscl,0\n")
    with pytest.raises(UsageError, match="has other columns"):
        read(file)
    assert file.read_text() == "setting,split\nscl,0\n"


def test_a_rival_is_read_off_at_our_density() -> None:
    theirs = lines_of("magnitude", (0.025, 0.90), (0.1, 0.98))
    # Half-way in the logarithm, hence 0.94; then a little beyond the last; then far beyond.
    for ours, gap in ((0.05, 0.95 - 0.94), (0.105, 0.95 - 0.98), (0.2, None), (0.02, None)):
        found = differences(lines_of("scl", (ours, 0.95)), theirs)
        assert found.tolist() == ([] if gap is None else pytest.approx([gap]))
    # Another split is another pair: none here.
    assert not len(differences([replace(LINE, split=4)], theirs))


def test_every_density_says_what_scl_has_more_than_each_rival() -> None:
    lines = [
        replace(line, split=split, top1=line.top1 + more)
        for split, more in ((0, 0.0), (1, 0.01))
        for line in [
            *lines_of("scl", (0.05, 0.95)),
            *lines_of("scl x=1", (0.05, 0.96 - 2 * more)),
            *lines_of("magnitude", (0.05, 0.94)),
            *lines_of("dense", (1.0, 0.97)),
        ]
    ]
    # Of two lines that differ in their settings alone, the later one counts.
    found = compared([replace(lines[0], top1=0.1, settings="old"), *lines])["5 %"]
    one = {"points": 1.0, "error": 0.0, "runs": 2}
    assert found["scl"]["less"] == {"magnitude": one, "dense": one | {"points": -2.0}}
    assert found["scl x=1"]["less"]["magnitude"] == {"points": 1.0, "error": 1.0, "runs": 2}


def test_methods_differ_in_nothing_but_themselves() -> None:
    first = {}
    for method in ("dense", "magnitude", "scl"):
        recipe = recipe_for("digits", method, 0.05, ["optim.epochs=1"])
        begun = first.setdefault(method, {})
        train(
            recipe,
            TASKS["digits"].images(0),
            0,
            lambda model, begun=begun: begun or begun.update(_copied(model)),
        )
    for method in ("magnitude", "scl"):
        assert all(torch.equal(first["dense"][name], v) for name, v in first[method].items())


def _copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_run_that_has_its_line_is_not_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_for("digits", "magnitude", 0.05, ["optim.epochs=1"])
    run = Run("digits", "magnitude", 0.05, 0, recipe)
    _, line = make(run)
    assert 0 < line.top1 < 1 and len(line.layers.split()) == 4
    append(tmp_path / "digits.csv", line)
    carry_out([run], 1, tmp_path)
    assert "1 of 1 runs are there already" in capsys.readouterr().out
    assert read(tmp_path / "digits.csv")[0].key == line.key == run.key
    other = recipe_for("digits", "magnitude", 0.05, ["optim.epochs=1", "every=5"])
    assert replace(run, recipe=other).key != run.key


def test_a_task_may_have_fewer_epochs_than_its_recipe() -> None:
    assert TASKS["glyphs_lenet"].epochs == 12
    for overrides, epochs in ([], 12), (["optim.epochs=2"], 2):
        assert recipe_for("glyphs_lenet", "scl", 0.05, overrides).optim.epochs == epochs


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_compiled_run_is_the_same_but_for_rounding() -> None:
    # Few updates and lr: later a weight that rounding puts above 0 in place of below makes another
    # network. Sums of some hundred products differ by some 1e-6 of themselves, and 11 updates carry
    # that on.
    recipe = recipe_for("digits", "dense", 1.0, ["optim.epochs=1", "optim.lr=0.001"])
    images = TASKS["digits"].images(0)
    few = replace(images, train=images.train[: 11 * recipe.optim.global_batch_size])
    plain, compiled = (train(recipe, few, 0, compiled=each) for each in (False, True))
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_density_that_a_method_has_no_setting_for_is_refused() -> None:
    with pytest.raises(UsageError, match=r"str cannot be asked for .* 3 %: leave it out"):
        recipe_for("digits", "str", 0.03, [])


@pytest.mark.parametrize("task", TASKS)
def test_every_method_of_a_task_fits_its_network(task: str) -> None:
    classes, size = (10, 8) if task == "digits" else (62, None)
    assert {"scl", "dense", "magnitude", "rigl", "feather", "st3", "optg", "acdc"} <= {
        *methods_of(task)
    }
    for method in methods_of(task):
        recipe = recipe_for(task, method, 0.025, [])
        model, image = model_on_meta(
            recipe.model,
            num_classes=classes,
            in_chans=1,
            image_size=size or recipe.data.image_size,
        )
        method_of_run = recipe.method.for_run(recipe.schedule, 100)
        optimizer = build_optimizer(method_of_run, recipe.optim, model, image)
        assert recipe.method.name == METHODS[method]["name"] and optimizer.param_groups


def test_a_packed_set_is_what_the_recipe_sees(tmp_path: Path) -> None:
    """Every image once, of half the size, standardised; val is held back."""
    random = np.random.default_rng(0)
    splits: dict[str, Reader] = {
        name: ArrayReader(random.integers(0, 256, (count, 16, 16), np.uint8), np.arange(count) % 3)
        for name, count in (("train", 30), ("val", 9))
    }
    pack(Source("made", "made", ["a", "b", "c"], splits), tmp_path / "set", progress=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {TASKS['glyphs_resnet'].recipe}\n"
        f"data: {{path: {tmp_path / 'set'}, image_size: 8, crop_padding: 1}}\n"
    )
    images = packed(recipe)
    assert images.images.shape == (39, 1, 8, 8) and images.classes == 3
    assert (len(images.train), len(images.held_back), images.margin) == (30, 9, 1)
    assert images.labels[images.train].bincount().tolist() == [10, 10, 10]
    assert images.labels[images.held_back].bincount().tolist() == [3, 3, 3]
    # Its own mean, but for what shrinking does to noise at the borders.
    assert abs(float(images.images[images.train].mean())) < 0.05
    missing = tmp_path / "missing.yaml"
    missing.write_text(f"base: {recipe}\ndata: {{path: {tmp_path / 'nowhere'}}}\n")
    with pytest.raises(DataError, match="nowhere"):
        packed(missing)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_last_line_is_the_comparison(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.front", "--quick", "--folder", str(tmp_path)]
    variant = ["--set", "scl.schedule.mask_lr=cosine", "--methods", "scl,magnitude"]
    for also in (["--methods", "scl,magnitude,dense", "--jobs", "2"], variant):
        code, output = finish(launch([*command, *also]), timeout=250)
        assert code == 0, output
    found = json.loads(output.splitlines()[-1])["details"]["digits"]
    assert found.keys() == {"10 %", "5 %"}
    assert found["5 %"].keys() == {"scl", "scl schedule.mask_lr=cosine"}
    code, output = finish(launch([*command, "--set", "scl.nonsense=1"]), timeout=100)
    assert code == 2 and "unknown key 'method.nonsense'" in output
