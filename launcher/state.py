"""The state of a run: gathered from the ranks into a checkpoint, and given back to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from launcher import checkpoint
from launcher.checkpoint import Checkpoint
from launcher.errors import RunError
from launcher.ranks import from_main, gather_to_main, local_state, restore_local_state
from launcher.run_folder import environment
from launcher.session import Session
from launcher.tracking import Tracker
from sclcore import SCL
from sclcore.optimizer import hash_masks


@dataclass
class Progress:
    """Where a run stands; with the recipe, this decides everything that is still to come."""

    step: int = 0
    """Updates tried so far; position in the data and in every schedule follow from it."""
    seconds: float = 0.0
    """Time spent training, over all interruptions; evaluation and saving are not in it."""
    results: dict[str, float] = field(default_factory=dict)
    best_top1: float = -1.0
    wandb_id: str | None = None


class Saver:
    """Writes checkpoints; every method is collective."""

    def __init__(self, session: Session, tracker: Tracker | None) -> None:
        self.folder = session.recipe.folder / "checkpoints"
        self._session = session
        self._tracker = tracker

    def save(self, progress: Progress, *, comparable: bool = False) -> None:
        """Publish a checkpoint. `comparable`: the masks are final, so it may be the best so far.

        Raises RunError on all ranks when their masks differ.
        """
        session = self._session
        check_masks_agree(session)
        ranks = gather_to_main(local_state(session.model, session.device))
        optimizer = session.optimizer_state.gather()
        top1 = progress.results.get("val/top1", -1.0)
        best = comparable and top1 > progress.best_top1
        if best:
            progress.best_top1 = top1
        if self._tracker is not None:
            # What a resumed run does not log again must be on disk by then.
            self._tracker.flush()
        if ranks is not None:
            parts: dict[str, Any] = {
                "model": session.model.state_dict(),
                "optimizer": optimizer,
            }
            parts |= {f"rank-{rank:05d}": state for rank, state in enumerate(ranks)}
            checkpoint.save(
                self.folder,
                step=progress.step,
                parts=parts,
                meta=self._meta(progress),
                keep=session.recipe.checkpoint.keep,
                best=best,
            )

    def _meta(self, progress: Progress) -> dict[str, Any]:
        return {
            "progress": vars(progress),
            "recipe": self._session.recipe.as_dict(),
            "data": self._session.manifest.fingerprint(),
            "samples": progress.step * self._session.plan.global_batch_size,
            "environment": environment(self._session.world),
        }


def restore(start: Checkpoint | None, session: Session) -> Progress:
    """Load a checkpoint into model, optimizer and generators; without one, a fresh `Progress`.

    At another world size than it was saved with, ranks that have no state of their own take the
    buffers of rank 0 and generators seeded by their rank.
    """
    if start is None:
        return Progress()
    world = session.world
    session.model.load_state_dict(checkpoint.load_part(start, "model"))
    session.optimizer_state.load(checkpoint.load_part(start, "optimizer"))
    same_world = start.meta["environment"]["world_size"] == world.world_size
    own = world.rank if same_world else 0
    rank_state = checkpoint.load_part(start, f"rank-{own:05d}")
    restore_local_state(session.model, session.device, rank_state)
    if not same_world and world.rank:
        torch.manual_seed(start.meta["recipe"]["seed"] + world.rank)
    return Progress(**start.meta["progress"])


def check_masks_agree(session: Session) -> None:
    """Compare the live connections of the ranks' networks; RunError names both hashes. Collective.

    It is the network that is compared, as each rank computes with it: under ZeRO no rank holds all
    masks, but the weights that were gathered must have the same zeros everywhere.
    """
    if not isinstance(session.optimizer, SCL):
        return
    learned = session.optimizer.connection_names
    parameters = session.model.named_parameters()
    ours = hash_masks({name: p.detach() != 0 for name, p in parameters if name in learned})
    hashes = from_main(gather_to_main(ours))
    for rank, other in enumerate(hashes):
        if other != hashes[0]:
            raise RunError(
                f"the masks of rank {rank} differ from those of rank 0 "
                f"({other[:16]}… and {hashes[0][:16]}…): the ranks did not see the same gradients; "
                "nothing was saved of this step"
            )
