from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launcher.checkpoints.manifest import CheckpointError
from launcher.checkpoints.saved_optimizer import Pieces, SavedOptimizer, layout_of, optimizer_part
from tests.launcher.checkpoints.saving import save

WHOLE = {"a": torch.arange(20.0).view(4, 5), "b": torch.arange(100.0, 107.0)}


def _piece(name: str, start: int, length: int) -> Pieces:
    values = WHOLE[name].reshape(-1)[start : start + length].clone()
    return {
        name: {
            "shape": list(WHOLE[name].shape),
            "start": start,
            "length": length,
            "values": {"weight": values, "mask": -values},
        }
    }


def _saved(root: Path, *ranks: Pieces, counter: str = "updates") -> SavedOptimizer:
    """What ranks holding these pieces would have saved."""
    parts = {optimizer_part(rank): pieces for rank, pieces in enumerate(ranks) if pieces}
    layout = {part: layout_of(pieces) for part, pieces in parts.items()}
    meta = {"optimizer": {counter: [3], "pieces": layout}}
    return SavedOptimizer(save(root, step=1, parts=parts, meta=meta, keep=1))


def test_any_stretch_is_read_from_any_cut(tmp_path: Path) -> None:
    first, second = _piece("a", 0, 7), _piece("a", 7, 13) | _piece("b", 0, 2)
    # A rank that holds nothing but padding saves nothing.
    saved = _saved(tmp_path, first, second, {}, _piece("b", 2, 5))
    assert saved.updates == [3]
    for name, whole in WHOLE.items():
        flat = whole.reshape(-1)
        for start in range(len(flat)):
            for end in range(start, len(flat) + 1):
                values = saved.read(name, start, end - start) if end > start else {}
                for key, sign in (("weight", 1), ("mask", -1)) if values else ():
                    assert torch.equal(values[key], sign * flat[start:end])
    whole = saved.whole()
    assert whole["a"]["shape"] == [4, 5]
    assert torch.equal(whole["a"]["values"]["weight"].view(4, 5), WHOLE["a"])


def test_the_counter_of_version_0_1_0_is_read(tmp_path: Path) -> None:
    assert _saved(tmp_path, _piece("a", 0, 20), counter="draws").updates == [3]


def test_a_rank_opens_only_the_files_it_needs(tmp_path: Path) -> None:
    saved = _saved(tmp_path, _piece("a", 0, 7), _piece("a", 7, 13))
    (tmp_path / "step-00000001" / "optimizer-00001.pt").unlink()
    assert len(saved.read("a", 2, 5)["mask"]) == 5
    with pytest.raises(CheckpointError, match="no part 'optimizer-00001'"):
        saved.read("a", 2, 6)


def test_what_was_not_saved_is_an_error(tmp_path: Path) -> None:
    saved = _saved(tmp_path, _piece("a", 0, 7))
    with pytest.raises(CheckpointError, match=r"holds 3 of 4 elements of a: .* another model"):
        saved.read("a", 4, 4)
    with pytest.raises(CheckpointError, match="holds 0 of 4 elements of c"):
        saved.read("c", 0, 4)
