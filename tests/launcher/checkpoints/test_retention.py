from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher.checkpoints import retention
from launcher.checkpoints.checkpoint import list_checkpoints
from launcher.checkpoints.manifest import Evaluation, Manifest
from launcher.checkpoints.retention import Evaluated, pareto_front, thin_out
from tests.launcher.checkpoints.saving import evaluation, save


def _evaluated(step: int, top1: float, live: int) -> Evaluated:
    return Evaluated(
        checkpoint=f"step-{step:08d}",
        step=step,
        top1=top1,
        live=live,
        connections=1000,
        density=live / 1000,
        final=False,
    )


def _save(root: Path, step: int, result: Evaluation | None, keep: int = 1, pareto: int = 0) -> None:
    parts = {"model": {"w": torch.zeros(3)}}
    save(root, step=step, parts=parts, meta={}, keep=keep, keep_pareto=pareto, evaluation=result)


def _steps(root: Path) -> list[int]:
    return [found.step for found in list_checkpoints(root)]


def _listed(root: Path) -> dict[int, tuple[float, int]]:
    lines = json.loads((root / "pareto.json").read_text())
    return {line["step"]: (line["top1"], line["live"]) for line in lines}


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_the_front_is_what_nothing_surpasses(points: list[tuple[int, int]]) -> None:
    all_of_them = [_evaluated(step, top1, live) for step, (top1, live) in enumerate(points)]
    front = pareto_front(all_of_them)
    # By definition: as good in both and better in one, or the same and later.
    expected = [
        e
        for e in all_of_them
        if not any(
            o.top1 >= e.top1
            and o.live <= e.live
            and (o.top1 > e.top1 or o.live < e.live or o.step > e.step)
            for o in all_of_them
        )
    ]
    assert {e.step for e in front} == {e.step for e in expected}
    assert [e.live for e in front] == sorted(e.live for e in front)


def test_a_thinned_front_spans_it() -> None:
    front = [_evaluated(live, live / 1000, live) for live in (10, 11, 100, 110, 1000)]
    assert [e.live for e in thin_out(front, 3)] == [10, 100, 1000]
    assert [e.live for e in thin_out(front, 2)] == [10, 1000]
    assert [e.live for e in thin_out(front, 1)] == [1000]
    assert thin_out(front, 0) == []
    assert thin_out(front, 9) == front


def test_best_is_among_final_models_only(tmp_path: Path) -> None:
    _save(tmp_path, 1, evaluation(0.9, final=False))
    assert not (tmp_path / "best").exists()
    _save(tmp_path, 2, evaluation(0.7))
    _save(tmp_path, 3, evaluation(0.8, final=False))
    _save(tmp_path, 4, evaluation(0.7))
    assert (tmp_path / "best").read_text() == "step-00000002\n"
    assert _steps(tmp_path) == [2, 4]


def test_a_model_that_nothing_surpasses_stays(tmp_path: Path) -> None:
    for step, (top1, live) in enumerate([(0.5, 900), (0.9, 500), (0.8, 600), (0.6, 100)], 1):
        _save(tmp_path, step, evaluation(top1, live, final=False), pareto=2)
    # 3 was the newest once, is surpassed by 2, and leaves with the fourth save.
    assert _steps(tmp_path) == [2, 4]
    assert _listed(tmp_path) == {4: (0.6, 100), 2: (0.9, 500)}
    _save(tmp_path, 5, None, pareto=2)
    assert _steps(tmp_path) == [2, 4, 5]


def test_the_list_outlives_the_folders_and_rewinds(tmp_path: Path) -> None:
    _save(tmp_path, 1, evaluation(0.9, 500, final=False))
    _save(tmp_path, 2, evaluation(0.5, 100, final=False))
    assert _steps(tmp_path) == [2]
    assert _listed(tmp_path) == {2: (0.5, 100), 1: (0.9, 500)}
    # The same step once more, with another outcome: only the newer counts.
    _save(tmp_path, 2, evaluation(0.4, 50, final=False))
    assert _listed(tmp_path) == {2: (0.4, 50), 1: (0.9, 500)}


def test_a_list_lost_to_a_kill_is_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _save(tmp_path, 1, evaluation(0.9, 500, final=False), pareto=3)
    (tmp_path / "pareto.json").write_text("[{")
    with caplog.at_level(logging.WARNING):
        _save(tmp_path, 2, evaluation(0.5, 100, final=False), pareto=3)
    assert "pareto.json cannot be read" in caplog.text
    assert _listed(tmp_path) == {2: (0.5, 100), 1: (0.9, 500)}


def test_a_new_run_does_not_inherit_a_list(tmp_path: Path) -> None:
    (tmp_path / "pareto.json").write_text(json.dumps([_evaluated(7, 1.0, 1).model_dump()]))
    _save(tmp_path, 1, evaluation(0.5, 100))
    assert _listed(tmp_path) == {1: (0.5, 100)}


def test_nothing_is_superfluous_twice() -> None:
    known = {
        f"step-{step:08d}": Manifest(step=step, serial=step, meta={}, files={})
        for step in (1, 2, 3, 4)
    }
    left = retention.superfluous(known, [], keep=2, keep_pareto=0)
    assert left == ["step-00000002", "step-00000001"]
