"""ZeRO stage 3: what goes with a run gives there what it gives in the stages below.

More of it: `test_zero.py`, `test_resume.py` (ranks, stages, maps of slices) and `test_average.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher.conftest import Start, assert_same_to_rounding, launch, summary
from tests.launcher.test_resume import segment
from tests.launcher.test_zero import assert_same_network

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

STAGE_3 = "engine.zero_stage=3"
SHORT = ("optim.epochs=2", "model.kwargs.norm=batch")


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of stage 0 on 2 ranks; a teacher as well."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    segment(launch, recipe, run_dir, *SHORT, ranks=2)
    return run_dir


def test_offloaded_state_is_trained_and_resumed_alike(
    recipe: Path, whole: Path, tmp_path: Path, start: Start
) -> None:
    """Offloaded until update 17 of 28, then not, then offloaded again: bits as in stage 0.

    On a CPU the state stays where it was, but gradients and norms go DeepSpeed's ways for it.
    """
    offloaded = (*SHORT, STAGE_3, "engine.offload_optimizer=true")
    segment(start, recipe, tmp_path / "run", *offloaded, ranks=2, stop=17)
    segment(start, recipe, tmp_path / "run", *SHORT, STAGE_3, ranks=2, stop=20)
    segment(start, recipe, tmp_path / "run", *offloaded, ranks=2)
    # Mask variables of features that ranks share: the rounding of a sum in another order.
    assert_same_network(tmp_path / "run", whole, within=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        ("method.granularity={'*': kernel, features.7: feature, classifier: weight}",),
        ("method.n_m={classifier: '2:4'}", "method.normalize=feature"),
        ("method.lam=null", "method.target_density=0.3"),
        ("distill={teacher: TEACHER, weight: 0.5}", "method.train_weights=false"),
    ],
    ids=["granularity", "n_m", "target", "teacher"],
)
def test_what_goes_with_it_is_the_same(
    settings: tuple[str, ...], recipe: Path, whole: Path, tmp_path: Path, start: Start
) -> None:
    """Two ranks' gradients have one sum in any stage: the weights are the same bit for bit."""
    settings = tuple(s.replace("TEACHER", str(whole)) for s in settings)
    for stage in (0, 3):
        run = tmp_path / f"stage{stage}"
        segment(start, recipe, run, *SHORT, *settings, f"engine.zero_stage={stage}", ranks=2)
    assert_same_network(tmp_path / "stage3", tmp_path / "stage0", within=1e-4)
    assert summary(tmp_path / "stage3")["live"] < summary(whole)["connections"]


def test_recomputed_activations_are_the_same(smooth: Path, tmp_path: Path, start: Start) -> None:
    """Layers are put together three times then: forward, forward again, backward."""
    common = ("optim.epochs=2", "engine.max_micro_batch=24")
    segment(start, smooth, tmp_path / "stage0", *common, ranks=2)
    segment(start, smooth, tmp_path / "run", *common, STAGE_3, "engine.recompute=true", ranks=2)
    assert_same_to_rounding(tmp_path / "run", tmp_path / "stage0")
