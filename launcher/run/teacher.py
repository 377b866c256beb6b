"""The teacher of a distillation: read, checked against the data, asked in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from data.shards.manifest import ImageStats, Manifest
from launcher.errors import UsageError
from launcher.folder.needed import check_run
from launcher.folder.results import read_recipe
from launcher.models import create_model
from launcher.models.cut import cut_in
from launcher.models.weights import read_state
from launcher.recipe.distill import DistillConfig
from launcher.recipe.model import ModelConfig
from launcher.recipe.recipe import Recipe


class Teacher:
    """A trained network that looks at the student's images.

    `stats` are those its images were normalised with, `seen` those of the student's; `in_half`: it
    computes in bfloat16 where that is safe.
    """

    def __init__(
        self,
        network: nn.Module,
        config: DistillConfig,
        stats: ImageStats,
        seen: ImageStats,
        *,
        in_half: bool = False,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self._config = config
        self._in_half = in_half
        scale = torch.tensor(seen.std) / torch.tensor(stats.std)
        shift = (torch.tensor(seen.mean) - torch.tensor(stats.mean)) / torch.tensor(stats.std)
        self._scale, self._shift = (t.reshape(1, -1, 1, 1) for t in (scale, shift))

    def to(self, device: torch.device) -> Teacher:
        """Move it there; returns itself."""
        self.network.to(device)
        self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        return self

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """[batch, classes] in float32, of images normalised for the student."""
        own = images.float() * self._scale + self._shift
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self._in_half):
            return self.network(own).float()

    def loss(self, student: Tensor, teacher: Tensor, of_labels: Tensor) -> Tensor:
        """(1 - w) · the loss of the labels + w · T² · KL(teacher ‖ student) at temperature T.

        T² keeps the size of the gradient whatever the temperature (arXiv 1503.02531, section 2).
        """
        weight, temperature = self._config.weight, self._config.temperature
        ours, theirs = (log_softmax(x / temperature, dim=1) for x in (student, teacher))
        apart = kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return (1 - weight) * of_labels + weight * temperature**2 * apart


def read_teacher(recipe: Recipe, manifest: Manifest, *, in_half: bool = False) -> Teacher | None:
    """The teacher that a recipe names, on the CPU; None where it names none.

    Raises UsageError with one sentence: no such run or model, other classes than the data, images
    that it does not take.
    """
    config = recipe.distill
    if config is None:
        return None
    channels = manifest.image.channels
    if Path(config.teacher).exists():
        network, stats = _of_run(Path(config.teacher), manifest)
    else:
        network, stats = _of_timm(config.teacher, manifest)
    sizes = {recipe.data.image_size, recipe.data.smallest_training_size}
    for size in sorted(sizes):
        try:
            with torch.no_grad():
                found = network.eval()(torch.zeros(1, channels, size, size))
        # A network may refuse in any way.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"distill.teacher: {config.teacher} does not take the student's images of "
                f"{channels}×{size}×{size}: {reason}"
            ) from error
        if tuple(found.shape) != (1, len(manifest.classes)):
            raise UsageError(
                f"distill.teacher: {config.teacher} has {found.shape[-1]} classes and the data "
                f"{len(manifest.classes)}: a teacher must know those of the student"
            )
    return Teacher(network, config, stats, manifest.image, in_half=in_half)


def _of_run(folder: Path, manifest: Manifest) -> tuple[nn.Module, ImageStats]:
    check_run(folder, "recipe.yaml", "origin.json")
    model = ModelConfig.model_validate(read_recipe(folder)["model"])
    data = json.loads((folder / "origin.json").read_text(encoding="utf-8"))["data"]
    state = read_state(str(folder), "distill.teacher")
    classes, stats = data["classes"], ImageStats.model_validate(data["image"])
    if classes != manifest.classes:
        raise UsageError(
            f"distill.teacher: {folder} has other classes ({len(classes)}) than the data "
            f"({len(manifest.classes)}): a teacher must know those of the student"
        )
    network = create_model(
        model,
        num_classes=len(classes),
        in_chans=stats.channels,
        cut=cut_in(folder, model),
    )
    if stats.channels != manifest.image.channels:
        raise UsageError(
            f"distill.teacher: {folder} takes images of {stats.channels} channels and the data has "
            f"{manifest.image.channels}"
        )
    network.load_state_dict(state)
    return network, stats


def _of_timm(name: str, manifest: Manifest) -> tuple[nn.Module, ImageStats]:
    # Here because it takes seconds to import.
    import timm

    if not timm.is_model(name.split(".")[0]):
        raise UsageError(
            f"distill.teacher: there is no {name}: give the folder of a run, or a model of timm's"
        )
    channels = manifest.image.channels
    try:
        network = timm.create_model(name, pretrained=True, in_chans=channels)
    # Much can fail on the way to the weights: the hub, a proxy, a disk, a damaged file.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(
            f"distill.teacher: the weights that timm publishes for {name} could not be loaded "
            f"({reason}); without a connection, give the folder of a run"
        ) from error
    about: dict[str, Any] = vars(network)["pretrained_cfg"]
    if channels != len(about["mean"]):
        return network, manifest.image
    mean, std = list(about["mean"]), list(about["std"])
    return network, ImageStats(channels=channels, mean=mean, std=std, measured_on=0)
