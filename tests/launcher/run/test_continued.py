"""`--continue-with`: a run that goes on with other values, recorded, and exact as any other."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from launcher import cli
from launcher.checkpoints.checkpoint import Checkpoint
from launcher.errors import UsageError
from launcher.folder.results import read_run
from launcher.recipe.load import load_recipe
from launcher.run.continued import MAY_CHANGE, check_keys, continued, shift_of
from tests.launcher.conftest import Start, finish, summary
from tests.launcher.test_resume import assert_identical

# 14 updates an epoch become 29.
LONGER = ("optim.epochs=6", "optim.lr=0.02", "optim.global_batch_size=48")


def go_on(
    start: Start, recipe: Path, run_dir: Path, *changes: str, stop: int | None = None
) -> tuple[int, str]:
    """One rank of the small recipe for 3 epochs, 42 updates, with other values or none."""
    module = "launcher.train" if stop is None else "tests.launcher.stopping_rank"
    command = [sys.executable, "-m", module, "--recipe", str(recipe)]
    command += ["--set", f"run_dir={run_dir}", "optim.epochs=3"]
    command += ["--continue-with", *changes] if changes else []
    return finish(start(command, SCL_TEST_STOP=f"{stop}:0"))


def test_longer_is_exact_recorded_and_keeps_final_masks(
    recipe: Path, tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    first, whole, cut = (tmp_path / name for name in ("first", "whole", "cut"))
    code, said = go_on(start, recipe, first)
    assert code == 0, said
    for copy in (whole, cut):
        shutil.copytree(first, copy)

    code, said = go_on(start, recipe, whole, *LONGER)
    assert code == 0, said
    assert "continues with optim.epochs 6 instead of 3" in said
    assert "continues at step 42 of 129" in said
    # Interrupted after the change, and begun again by the same command.
    code, said = go_on(start, recipe, cut, *LONGER, stop=60)
    assert code == 128 + signal.SIGUSR1, said
    code, said = go_on(start, recipe, cut, *LONGER)
    assert code == 0 and "instead of" not in said, said
    assert_identical(cut, whole)

    # The masks were final at epoch 1.8 of 3, and are so at 1.8 of 6.
    assert summary(whole)["mask_hash"] == summary(first)["mask_hash"]
    resolved = yaml.safe_load((whole / "recipe.yaml").read_text())
    assert resolved["schedule"]["freeze_masks_at"] == pytest.approx(0.3, abs=1e-12)
    for run in (whole, cut):
        [line] = (run / "continued.jsonl").read_text().splitlines()
        record = json.loads(line)
        assert record["step"] == 42
        assert record["changed"]["optim.epochs"] == {"from": 3, "to": 6}
        assert record["changed"]["optim.lr"] == {"from": 0.05, "to": 0.02}
        assert record["changed"].keys() == {
            *("optim.epochs", "optim.lr", "optim.global_batch_size", "schedule.freeze_masks_at")
        }
        epochs, _ = read_run(run).series("val/top1")
        assert epochs == [1, 2, 3, 4, 5, 6]
        kept = run / "before-step-00000042"
        for name in ("model.safetensors", "summary.json", "layers.csv"):
            assert (kept / name).read_bytes() == (first / name).read_bytes()

    # The plain command is refused, and says how to mean it; the other says that all is done.
    code, said = go_on(start, recipe, whole)
    assert code == 2 and "optim.epochs is 3 here and 6 there; go on with this one by" in said
    command = ["train", "--recipe", str(recipe), "--set", f"run_dir={whole}", "optim.epochs=3"]
    assert cli.main([*command, "--continue-with", *LONGER]) == 0
    assert "is finished; choose another" in capsys.readouterr().err

    # Another λ: masks learn again, up to where they are told to.
    more = ("optim.epochs=8", *LONGER[1:], "method.lam=2", "schedule.freeze_masks_at=0.95")
    code, said = go_on(start, recipe, whole, *more)
    assert code == 0, said
    assert summary(whole)["live"] < 0.8 * summary(first)["live"]
    assert len((whole / "continued.jsonl").read_text().splitlines()) == 2


@dataclass(frozen=True)
class Places:
    """Inputs with 14 updates an epoch."""

    total_steps: int

    def place(self, step: int) -> int:
        return step


def saved(recipe: Path, step: int, *settings: str, shift: int = 0) -> Checkpoint:
    values = load_recipe(recipe, ["optim.epochs=3", *settings]).as_dict()
    progress = {"epochs": (step - shift) // 14, "shift": shift}
    meta = {"recipe": values, "progress": progress, "steps_per_epoch": 14}
    return Checkpoint(Path("step"), step, meta)


def test_masks_that_still_learn_do_so_for_the_same_share_of_the_longer_run(recipe: Path) -> None:
    longer, places = load_recipe(recipe, ["optim.epochs=6"]), Places(84)
    first, again = saved(recipe, 20), saved(recipe, 60, "optim.epochs=6")
    assert continued(longer, first, ["optim.epochs"], places).schedule == longer.schedule
    assert continued(longer, again, ["optim.epochs"], places).schedule == longer.schedule


def test_the_batch_changes_between_epochs_alone(recipe: Path) -> None:
    assert shift_of(saved(recipe, 42), 14) == 0
    assert shift_of(saved(recipe, 42), 29) == 42 - 3 * 29
    # A second change: the epochs behind are counted as they were.
    twice = saved(recipe, 42 + 29, shift=42 - 3 * 29)
    twice.meta.update(steps_per_epoch=29, progress={"epochs": 4, "shift": 42 - 3 * 29})
    assert shift_of(twice, 29) == 42 - 3 * 29
    assert shift_of(twice, 7) == 42 + 29 - 4 * 7
    with pytest.raises(UsageError, match="within an epoch, and the batch may change between two"):
        shift_of(saved(recipe, 43), 29)


@pytest.mark.parametrize(
    ("settings", "step", "sentence"),
    [
        (["optim.epochs=2"], 42, "optim.epochs=2: step has 3 epochs behind it already"),
        (["method.lam=0.5"], 42, r"masks are final from epoch 1\.8 on and the run has 3 behind it"),
        (
            ["method={name: rigl, density: 0.1}", "optim.epochs=5"],
            20,
            "method rigl follows a schedule over the whole run",
        ),
    ],
)
def test_what_could_have_no_effect_is_refused(
    settings: list[str], step: int, sentence: str, recipe: Path
) -> None:
    keys = [setting.partition("=")[0] for setting in settings]
    method = [s for s in settings if s.startswith("method={")]
    asked = load_recipe(recipe, ["optim.epochs=3", *settings])
    with pytest.raises(UsageError, match=sentence):
        continued(asked, saved(recipe, step, *method), keys, Places(14 * asked.optim.epochs))


def test_what_makes_another_run_is_refused(recipe: Path, tmp_path: Path, capsys) -> None:
    for key in ("model.name", "seed", "method.name", "optim.name"):
        with pytest.raises(UsageError, match=f"{key}: that makes another run; what may change in"):
            check_keys([key])
    check_keys(MAY_CHANGE)
    command = ["train", "--recipe", str(recipe), "--set", f"run_dir={tmp_path}/none"]
    assert cli.main([*command, "--continue-with", "optim.epochs=20"]) == 2
    assert "none holds no run that could be continued" in capsys.readouterr().err
