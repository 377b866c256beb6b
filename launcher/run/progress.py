"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """Where a run stands; with the recipe, this decides everything that is still to come."""

    step: int = 0
    """Updates tried so far; position in the data and in every schedule follow from it."""
    epochs: int = 0
    """Epochs trained and evaluated."""
    seconds: float = 0.0
    """Time spent training, over all interruptions; evaluation and saving are not in it."""
    results: dict[str, float] = field(default_factory=dict)
    """Of the newest evaluation."""
    best_top1: float = 0.0
    """The best evaluation of a network with its final connections; averaged weights count too."""
    best_epoch: int = 0
    """The epochs trained when it was made; 0 before there was one."""
    stopped_early: bool = False
    """Whether the run has ended on a plateau, before its last epoch."""
    patient_from: int = 0
    """The epoch from which a plateau is counted at the earliest: where the run was continued with
    other values."""
    shift: int = 0
    """Updates by which the run is ahead of one that had its batch size from the beginning."""
    wandb_id: str | None = None
    wandb_said: dict[str, str] = field(default_factory=dict)
    """What W&B's variables have said of how it shows the run."""
    steering: dict[str, float] | None = None
    """Of λ, where the recipe has a target (`sclcore.scl.controller.Steering`)."""

    def continue_changed(self) -> None:
        """Go on with other values: what has come to a plateau is given as long again."""
        self.stopped_early, self.patient_from = False, self.epochs
