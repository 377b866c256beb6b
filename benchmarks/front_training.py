"""One run of a recipe in a bare loop: its model, optimizer and schedule, without the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.defaults import shifted
from launcher.models import create_model
from launcher.recipe.recipe import Recipe
from launcher.run.course import Course
from launcher.run.optimizer import build_optimizer
from launcher.run.progress import Progress
from launcher.run.target import controller_of
from sclcore.driver.optimizer import Driver
from sclcore.network.connections import find_connections

_EVALUATED = 500

Masks = dict[str, Tensor]
# Of the network's outputs, the images, and the loss of the labels.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def of_labels_alone(outputs: Tensor, images: Tensor, of_labels: Tensor) -> Tensor:
    return of_labels


@dataclass(frozen=True)
class Images:
    """One split of a set: standardised images [N, C, H, W], labels [N], and which are trained on.

    `margin`: by how many pixels images are moved in training, at most.
    """

    images: Tensor
    labels: Tensor
    train: Tensor
    held_back: Tensor
    margin: int

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1


def train(
    recipe: Recipe,
    of: Images,
    seed: int,
    after_update: Callable[[nn.Module], None] = lambda model: None,
    loss: Loss = of_labels_alone,
    compiled: bool = False,
) -> nn.Module:
    """The network at the end. Initial weights and the order of images follow from `seed` alone.

    `after_update` is called with the network before the first update and after each; `loss` may
    add to that of the labels. `compiled`: in half the time, with sums rounded differently.
    """
    torch.manual_seed(seed)
    channels = of.images.shape[1]
    model = create_model(recipe.model, num_classes=of.classes, in_chans=channels)
    forward = torch.compile(model) if compiled else model
    example = torch.empty(1, *of.images.shape[1:])
    generator = torch.Generator().manual_seed(seed)
    batch = recipe.optim.global_batch_size
    steps = len(of.train) // batch
    total = steps * recipe.optim.epochs
    method = recipe.method.for_run(recipe.schedule, total)
    optimizer = build_optimizer(method, recipe.optim, model, example)
    controller = controller_of(recipe, model, optimizer, example, total)
    course, progress = Course(recipe, optimizer, controller, total), Progress()
    after_update(model)
    for _ in range(recipe.optim.epochs):
        order = of.train[torch.randperm(len(of.train), generator=generator)]
        for chosen in order[: steps * batch].split(batch):
            course.set(progress)
            optimizer.zero_grad()
            if isinstance(optimizer, Driver):
                optimizer.before_update()
            images = shifted(of.images[chosen], generator, of.margin)
            outputs = forward(images)
            of_labels = cross_entropy(
                outputs, of.labels[chosen], label_smoothing=recipe.optim.label_smoothing
            )
            loss(outputs, images, of_labels).backward()
            _clip(model, recipe.optim.clip_grad_norm)
            optimizer.step()
            progress.step += 1
            after_update(model)
    return model


def _clip(model: nn.Module, bound: float | None) -> None:
    if bound is not None:
        nn.utils.clip_grad_norm_(model.parameters(), bound)


@torch.no_grad()
def evaluate(model: nn.Module, of: Images) -> tuple[float, float]:
    """Top-1 and mean cross-entropy of the images that were held back."""
    model.eval()
    correct = loss = 0.0
    for chosen in of.held_back.split(_EVALUATED):
        outputs, labels = model(of.images[chosen]), of.labels[chosen]
        correct += float((outputs.argmax(1) == labels).sum())
        loss += float(cross_entropy(outputs, labels, reduction="sum"))
    return correct / len(of.held_back), loss / len(of.held_back)


def structure(model: nn.Module) -> Masks:
    """Which weights of convolutions and linear layers are not 0."""
    return {c.name: c.parameter.detach() != 0 for c in find_connections(model)}


def density(masks: Masks) -> float:
    return sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
