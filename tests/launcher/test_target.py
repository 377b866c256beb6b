"""`method.target_density`, `target_macs` and `scl forecast` on real runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.folder.results import read_run, total_of
from launcher.models import model_on_meta
from launcher.recipe.load import load_recipe
from launcher.run.inputs import open_inputs
from launcher.run.optimizer import build_optimizer
from launcher.run.target import controller_of
from tests.launcher.conftest import Start, assert_same_to_rounding, finish, scl
from tests.launcher.test_resume import TARGET, segment

pytestmark = pytest.mark.timeout(900)


def test_ranks_and_stages_steer_alike(smooth: Path, tmp_path: Path, start: Start) -> None:
    """2 ranks in stage 2, and 1 rank in stage 0."""
    segment(start, smooth, tmp_path / "sharded", *TARGET, "engine.zero_stage=2", ranks=2)
    # To within one connection, whatever masks learned in 67 updates.
    total = total_of(read_run(tmp_path / "sharded").layers)
    assert total.live == round(0.3 * total.connections)
    segment(start, smooth, tmp_path / "alone", *TARGET, ranks=1)
    sharded, alone = (read_run(tmp_path / name).series("lam")[1] for name in ("sharded", "alone"))
    assert len(set(sharded)) > 10, "λ is logged, and moves"
    # Sums in another order; the controller acts on mask variables, which differ by rounding.
    # Near its lowest, of 0.03, λ was seen to differ by 1e-4.
    assert alone == pytest.approx(sharded, abs=1e-3)
    # The choice at the end is seen by the same forward pass in every stage.
    assert_same_to_rounding(tmp_path / "alone", tmp_path / "sharded")


def test_excluded_layers_count_in_both_targets(recipe: Path) -> None:
    """The share that is asked of the other layers, with every weight as often as it is used."""
    for key, used in (("target_density", 1), ("target_macs", 8 * 8)):
        settings = [f"method.{key}=0.3", "method.exclude=[features.0]"]
        read = load_recipe(recipe, settings)
        inputs = open_inputs(read, 1)
        model, image = model_on_meta(read.model, num_classes=10, in_chans=1, image_size=8)
        optimizer = build_optimizer(inputs.method, read.optim, model, image)
        controller = controller_of(read, model, optimizer, image, total_steps=100)
        assert controller is not None and inputs.manifest.classes
        # By hand: 3×3 convolutions of 1 → 8 → 16 on 8×8, 16 → 16 on 4×4, and 64 → 10 once.
        on_4 = 1 if used == 1 else 4 * 4
        first = used * 9 * 1 * 8
        others = used * 9 * 8 * 16 + on_4 * 9 * 16 * 16 + 64 * 10
        assert controller.target == pytest.approx((0.3 * (first + others) - first) / others)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["method.target_density=0.1", "method.target_macs=0.1"], "cannot meet both"),
        (["method.lam=null"], "needs lam, or target_density or target_macs"),
        (["method.target_density=0.1", "method.n_m=2:4"], "N:M decides the density itself"),
        (["method.target_density=1.5"], "method.target_density"),
        (["method.target_density=0.1", "schedule.freeze_masks_at=0"], "masks that move"),
        (
            ["method.target_density=0.1", "method.exclude=[features.3, features.7]"],
            "less than the layers in method.exclude have already",
        ),
    ],
)
def test_what_cannot_be_is_refused(settings: list[str], said: str, recipe: Path) -> None:
    with pytest.raises(UsageError, match=said):
        open_inputs(load_recipe(recipe, settings), 1)


def test_a_forecast_is_a_table_and_leaves_nothing(
    recipe: Path, tmp_path: Path, start: Start
) -> None:
    run_dir = tmp_path / "run"
    command = scl("forecast", "--recipe", recipe, "--set", f"run_dir={run_dir}", "--share", "0.9")
    code, output = finish(start([*command, "--lam", "0.05", "0.3", "1.2"]))
    assert code == 0, output
    head, *rows = [line.split() for line in output.splitlines()][-4:]
    assert head == ["λ", "density", "MACs"]
    densities = [float(row[1]) for row in rows]
    assert [row[0] for row in rows] == ["0.05", "0.3", "1.2"]
    assert 100 >= densities[0] > densities[1] > densities[2]
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["method.lam=null", "method.target_density=0.1"], "method.target_density=null"),
        (["method.n_m=2:4"], "nothing to forecast"),
        (["method={name: dense}"], "has no λ"),
        (["optim.epochs=1"], "too few to see anything"),
    ],
)
def test_what_has_no_forecast(settings: list[str], said: str, recipe: Path) -> None:
    from launcher.start.forecast import forecast_recipe

    with pytest.raises(UsageError, match=said):
        forecast_recipe(load_recipe(recipe, settings))
