"""What the written model of a run says of each sample."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from data.stream.pipeline import normalise
from launcher.cluster.accelerator import accelerator
from launcher.errors import RunError, UsageError
from launcher.evaluation.samples import Known, Samples, known_of, open_samples
from launcher.folder.needed import check_run
from launcher.models import create_model
from launcher.models.cut import cut_in
from launcher.models.weights import read_state
from launcher.recipe.load import load_recipe
from launcher.recipe.recipe import Recipe
from launcher.terminal import Pace, say


@dataclass(frozen=True)
class Predictions:
    """One entry per sample, in order of sample; `classes` are their names by label.

    `label` and `predicted` are int64, `confidence` is the probability of the predicted class,
    `loss` the cross entropy in nats. Where `sound` is False the sample could not be decoded: it
    counts as wrong, and its other entries mean nothing.
    """

    run: str
    source: str
    classes: list[str]
    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    in_top5: NDArray[np.bool_]
    confidence: NDArray[np.float64]
    loss: NDArray[np.float64]
    sound: NDArray[np.bool_]

    @property
    def correct(self) -> NDArray[np.bool_]:
        return (self.predicted == self.label) & self.sound


def predict_run(
    run: Path, *, split: str = "val", data: str | None = None, model: Path | None = None
) -> Predictions:
    """Evaluate the model that the run in folder `run` wrote, in this process.

    `data` replaces the data.path of its recipe, `model` the file of weights. Raises UsageError when
    the run has no model, or the weights or the samples are not of its kind.
    """
    check_run(run, "recipe.yaml", *(() if model else ("model.safetensors",)))
    recipe = load_recipe(run / "recipe.yaml")
    config = recipe.data if data is None else recipe.data.model_copy(update={"path": data})
    known = known_of(run, recipe)
    network = load_network(recipe, known, model or run, run)
    samples = open_samples(config, known, split)
    return _predict(network, samples, known, run.resolve().name)


def load_network(recipe: Recipe, known: Known, weights: Path, run: Path) -> torch.nn.Module:
    """The network of a run with `weights`, in evaluation mode, where it computes."""
    network = create_model(
        recipe.model,
        num_classes=len(known.classes),
        in_chans=known.image.channels,
        cut=cut_in(run, recipe.model),
    )
    try:
        network.load_state_dict(read_state(str(weights), "--model"))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{weights} is not of the model {recipe.model.name}: {reason}") from error
    return network.to(accelerator()).eval()


@torch.no_grad()
def _predict(network: torch.nn.Module, samples: Samples, known: Known, run: str) -> Predictions:
    count, device = samples.count, torch.device(accelerator())
    entries = {
        "label": np.zeros(count, np.int64),
        "predicted": np.zeros(count, np.int64),
        "in_top5": np.zeros(count, np.bool_),
        "confidence": np.zeros(count, np.float64),
        "loss": np.zeros(count, np.float64),
        "sound": np.zeros(count, np.bool_),
    }
    seen = np.zeros(count, np.int64)
    pace = Pace()
    for batch in samples.batches:
        if pace.is_due():
            done = f"{int((seen > 0).sum()):,} of {count:,} samples"
            say(f"evaluating {run}: {done}, {pace.seconds:.0f} s so far")
        labels = batch["label"].to(device)
        logits = network(normalise(batch["image"].to(device), known.image)).double()
        ranked = logits.topk(min(5, logits.shape[1])).indices
        columns = {
            "label": labels,
            "predicted": ranked[:, 0],
            "in_top5": (ranked == labels[:, None]).any(1),
            "confidence": logits.softmax(1).amax(1),
            "loss": cross_entropy(logits, labels, reduction="none"),
            "sound": batch["corrupt"] == 0,
        }
        valid = batch["valid"].numpy()
        ids = batch["id"].numpy()[valid]
        np.add.at(seen, ids, 1)
        for name, values in columns.items():
            entries[name][ids] = values.cpu().numpy()[valid]
    if (seen != 1).any():
        raise RunError(
            f"evaluation saw {int((seen == 1).sum())} of {count} samples exactly once: the batches "
            f"of {samples.source} do not cover it"
        )
    return Predictions(run=run, source=samples.source, classes=known.names, **entries)
