"""`init`: the weights and masks that a new run starts from."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from data.shards.manifest import Manifest
from launcher.cluster.ranks import from_main
from launcher.errors import UsageError
from launcher.folder.results import percent
from launcher.models import create_model
from launcher.models.cut import cut_in
from launcher.models.weights import (
    check_masks,
    fitted,
    live_connections,
    named_by_timm,
    read_state,
)
from launcher.recipe.init import AUTO, MAGNITUDE, PRETRAINED, RANDOM, UNIFORM, InitConfig
from launcher.recipe.model import ModelConfig
from launcher.recipe.recipe import Recipe
from launcher.run.parameters import Parameters
from sclcore import SCL
from sclcore.layout.geometry import Geometry, geometry_of

# A network with more of its weights live counts as dense: its few zeros are chance, or a layer
# that begins with them.
_DENSE = 0.99


@dataclass(frozen=True)
class Initial:
    """What was read for a new run, on the CPU; empty on ranks that get it from rank 0.

    `weights` are by name; those of a classifier for other classes are missing. `live` has the live
    connections of each tensor, by name; all live where it is missing. `notes` are for the user.
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    live: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_initial(recipe: Recipe, manifest: Manifest) -> Initial:
    """Read and check what the `init` of a recipe names.

    Raises UsageError with one sentence: no such file, weights that cannot be fetched or are of
    another model, masks for a method that has none.
    """
    init, method, model = recipe.init, recipe.method, recipe.model
    notes: list[str] = []
    weights: dict[str, Tensor] = {}
    live: dict[str, Tensor] = {}
    channels = manifest.image.channels
    sizes = {"num_classes": len(manifest.classes), "in_chans": channels}
    if init.masks not in (AUTO, UNIFORM) and not method.takes_masks:
        raise UsageError(
            f"init.masks: {init.masks} needs mask variables, and method {method.name} has none: "
            "choose method.name=scl, or init.masks=uniform"
        )
    if init.weights == PRETRAINED:
        weights = _pretrained(model, sizes, notes)
    elif init.weights != RANDOM:
        blank = _blank(model, sizes)
        state = _cut_alike(read_state(init.weights, "init.weights"), model)
        weights, said = fitted(state, blank, channels, init.weights)
        notes += said
        if init.masks == AUTO:
            live = _structure_of(weights, blank, recipe, notes)
    if init.masks not in (AUTO, UNIFORM, MAGNITUDE):
        state = _cut_alike(read_state(init.masks, "init.masks"), model)
        live, said = check_masks(state, _blank(model, sizes), channels, init.masks)
        notes += said
    return Initial(weights, live, tuple(notes))


def _structure_of(
    weights: Mapping[str, Tensor], blank: nn.Module, recipe: Recipe, notes: list[str]
) -> dict[str, Tensor]:
    """The live connections of a network that is sparse, for a method that can keep them."""
    live = live_connections(weights, blank)
    total = sum(mask.numel() for mask in live.values())
    density = sum(int(mask.sum()) for mask in live.values()) / max(total, 1)
    if density > _DENSE:
        return {}
    source = f"init.weights: {recipe.init.weights} is sparse, {percent(density)} of it is live"
    if not recipe.method.takes_masks:
        if not recipe.method.keeps_zeros:
            notes.append(
                f"{source}, and method {recipe.method.name} does not keep its zeros: scl does, and "
                "`scl retrain` trains its weights alone"
            )
        return {}
    notes.append(f"{source}: its zeros start dead (init.masks=uniform would bring them back)")
    return live


def _cut_alike(state: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """What `model.cut` keeps of a whole model's weights; those of a cut one as they are."""
    cut = cut_in(None, model)
    return state if cut is None else cut.of_state(state)


def _blank(model: ModelConfig, sizes: dict[str, int]) -> nn.Module:
    with torch.device("meta"):
        return create_model(model, num_classes=sizes["num_classes"], in_chans=sizes["in_chans"])


def _pretrained(config: ModelConfig, sizes: dict[str, int], notes: list[str]) -> dict[str, Tensor]:
    # Here because it takes seconds to import.
    import timm

    if not timm.is_model(config.name.split(".")[0]):
        raise UsageError(
            f"init.weights: {config.name} is not one of timm's models, which has no weights of it: "
            "name a run or a file instead of timm-pretrained"
        )
    wanted = config.model_copy(update={"kwargs": config.kwargs | {"pretrained": True}})
    try:
        model = create_model(wanted, num_classes=sizes["num_classes"], in_chans=sizes["in_chans"])
    # Much can fail on the way to the weights: the hub, a proxy, a disk, a damaged file.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"init.weights: the weights that timm publishes for {config.name} could not be loaded "
            f"({reason[:300]}); without a connection, copy the file here and set init.weights to "
            "its path"
        ) from error
    state = dict(model.state_dict())
    known: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    if known.get("num_classes") != sizes["num_classes"]:
        names = named_by_timm(model, "classifier")
        # Left out, so that they are drawn from the run's own seed.
        state = {k: v for k, v in state.items() if not k.startswith(tuple(f"{n}." for n in names))}
        notes.append(
            f"init.weights: the classifier {', '.join(names)} is for {known.get('num_classes')} "
            f"classes there and {sizes['num_classes']} here: it starts anew"
        )
    return state


def initial_model(recipe: Recipe, manifest: Manifest, initial: Initial) -> nn.Module:
    """The model of a recipe on the CPU, with the weights that a new run starts from.

    The same recipe, data and version of PyTorch give the same weights.
    """
    seed = recipe.seed if recipe.init.seed is None else recipe.init.seed
    seed_everything(seed)
    model = create_model(
        recipe.model, num_classes=len(manifest.classes), in_chans=manifest.image.channels
    )
    if seed != recipe.seed:
        seed_everything(recipe.seed)
    # Not strict: the classifier of other classes is missing, as `read_initial` has checked.
    model.load_state_dict(dict(initial.weights), strict=False)
    return model


def share(model: nn.Module) -> None:
    """Give all ranks the parameters and buffers of rank 0. Collective."""
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)


def hash_weights(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, with their names."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def first_masks(optimizer: Optimizer, init: InitConfig, initial: Initial) -> dict[str, Tensor]:
    """The mask variables that SCL starts with, by name; the same on all ranks. Collective.

    To be called before an engine replaces the parameters. Empty where SCL's own uniform masks do.
    """
    if init.masks == UNIFORM or (init.masks == AUTO and not from_main(bool(initial.live))):
        return {}
    assert isinstance(optimizer, SCL)
    masks = {}
    for group in optimizer.param_groups:
        if not group["connections"]:
            continue
        for place, (name, param) in enumerate(zip(group["names"], group["params"], strict=True)):
            weight = param.detach().float()
            geometry = geometry_of(group, place, param.shape)
            if init.masks == MAGNITUDE:
                mask = magnitude_masks(weight, geometry)
            elif name in initial.live:
                live = _whole_units(initial.live[name].float(), geometry).gt(0)
                mask = live.to(weight.device).float() * 2 - 1
            else:
                mask = torch.ones_like(weight)
            mask = (mask * group["mask_init"]).contiguous()
            # From rank 0 to all: on another kind of device they might be rounded otherwise.
            dist.broadcast(mask, 0)
            masks[name] = mask.bfloat16() if group["mask_dtype"] == "bfloat16" else mask
    return masks


def magnitude_masks(weight: Tensor, geometry: Geometry) -> Tensor:
    """|w| / mean |w| of the feature; of the layer, where a feature has one mask variable.

    The mean of a feature's masks is 1, as with uniform ones: mask gradients are normalised over
    the feature, so that λ then takes as long to reach an average connection. A unit of several
    weights has their mean. A feature of zeros, whose weights say nothing, gets uniform masks.
    """
    size = _whole_units(weight.abs(), geometry)
    if geometry.variables_per_feature == 1:
        mean = size.mean()
    elif groups := geometry.transposed_groups:
        rows = size.view(groups, size.shape[0] // groups, size.shape[1], -1)
        mean = rows.mean((1, 3), keepdim=True).expand_as(rows).reshape(size.shape)
    else:
        mean = size.flatten(1).mean(1).view(-1, *[1] * (size.ndim - 1))
    return torch.where(mean > 0, size / mean.clamp(min=torch.finfo(size.dtype).tiny), 1.0)


def _whole_units(values: Tensor, geometry: Geometry) -> Tensor:
    """`values`, with the elements of a unit, which live or die together, all set to their mean."""
    if geometry.unit == 1:
        return values.contiguous()
    units = values.contiguous().view(-1, geometry.unit)
    return units.mean(1, keepdim=True).expand_as(units).reshape(values.shape)


class FirstState:
    """The state that SCL starts with, read by name and stretch like a saved one."""

    def __init__(
        self, parameters: Parameters, masks: Mapping[str, Tensor], updates: list[int]
    ) -> None:
        self._parameters = parameters
        self._masks = masks
        self.updates = updates

    def read(self, name: str, start: int, length: int) -> dict[str, Tensor]:
        """Elements `start` … `start + length` of the latent weights and masks of `name`."""
        if name not in self._masks:
            return {}
        weight = self._parameters.read(name, start, length)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        mask = self._masks[name].to(weight.device).reshape(-1)[start : start + length]
        return {"weight": weight.to(dtype, copy=True), "mask": mask}

    def read_whole(self, name: str) -> dict[str, Any]:
        return {}


def seed_everything(seed: int) -> None:
    """Seed every generator that initial weights, dropout or a library may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
