"""The formats of `scl export`: how each is written, and what it is good for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launcher.errors import UsageError
from launcher.export.asked import Options
from launcher.export.sizes import sizes
from launcher.export.source import Source
from launcher.run.validate import evaluate
from sclcore import connection_groups, layer_budgets, weight_uses
from sclcore.connections import LayerBudget, find_connections
from sclcore.export import (
    ExportError,
    budgets_csv,
    save_compact,
    save_onnx,
    save_program,
    save_sparse_model,
    save_state_dict,
)
from sclcore.export.graphs import Compared
from sclcore.export.semi_structured import Pattern, patterns, to_semi_structured
from sclcore.export.values import rounded

# A batch of one is a special case to PyTorch's tracer.
EXAMPLE_BATCH = 2
_DENSE = "zeros are stored and multiplied like other numbers: as large and as slow as dense"


@dataclass
class Job:
    """One export under way. `graph` is what onnx and torch get: `source.model`, or less of it."""

    options: Options
    source: Source
    graph: nn.Module
    accuracy: dict[str, float] = field(default_factory=dict)
    sizes: list[dict[str, Any]] = field(default_factory=list)
    patterns: list[dict[str, Any]] = field(default_factory=list)

    @property
    def example(self) -> Tensor:
        return self.source.network.example(EXAMPLE_BATCH)

    def about(self) -> dict[str, Any]:
        """What each file says of the model in it."""
        source = self.source
        cut = source.network.cut
        return {
            **source.network.as_dict(),
            **({} if cut is None else {"cut": cut.model_dump(mode="json")}),
            "step": source.step,
            "finished": source.finished,
        }

    def budgets(self, model: nn.Module | None = None) -> list[LayerBudget]:
        """Connections and MACs of each layer; a connection is live where its weight is not zero."""
        model = model or self.source.model
        masks = {c.name: c.parameter != 0 for c in find_connections(model)}
        return layer_budgets(model, weight_uses(model, self.example[:1]), masks)

    def measure(self, what: str, model: nn.Module) -> float | None:
        """Top-1 of `model` on the validation split, kept under `what`; None without shards."""
        validation = self.source.validation_set(self.options.data)
        if validation is None:
            return None
        dataset, config = validation
        dtype = next(model.parameters()).dtype
        results = evaluate(
            lambda images: model(images.to(dtype)), dataset, config, device=torch.device("cpu")
        )
        self.accuracy[what] = results["val/top1"]
        return self.accuracy[what]


@dataclass(frozen=True)
class Written:
    """A file as it was checked, and what speed to expect of it, in words."""

    file: str
    checked: str
    speed: str
    more: Mapping[str, Any] = field(default_factory=dict)


def write_safetensors(job: Job, folder: Path) -> Written:
    path = folder / "model.safetensors"
    save_sparse_model(job.source.model, path, metadata=job.about())
    return Written(path.name, "read back, bit for bit", _DENSE)


def write_state_dict(job: Job, folder: Path) -> Written:
    path = folder / "model.pt"
    save_state_dict(job.source.model, path)
    return Written(path.name, "read back with weights_only=True, bit for bit", _DENSE)


def write_csv(job: Job, folder: Path) -> Written:
    path = folder / "layers.csv"
    path.write_text(budgets_csv(job.budgets()), encoding="utf-8")
    return Written(path.name, "counted from the weights", "no model: a table")


def write_torch(job: Job, folder: Path) -> Written:
    path = folder / "model.pt2"
    return _graph(path.name, save_program(_single(job.graph), path, job.example), job)


def write_onnx(job: Job, folder: Path) -> Written:
    path = folder / "model.onnx"
    return _graph(path.name, save_onnx(_single(job.graph), path, job.example), job)


def _single(model: nn.Module) -> nn.Module:
    """`model` in float32, which every runtime has on every machine."""
    if all(p.dtype == torch.float32 for p in model.parameters()):
        return model
    return copy.deepcopy(model).float()


def _graph(name: str, compared: Compared, job: Job) -> Written:
    checked = (
        f"run again: outputs differ by {compared.difference:.1e}, "
        f"the largest is {compared.scale:.2g}"
    )
    speed = _DENSE
    if job.graph is not job.source.model:
        macs_before, macs_now = (macs_of(m, job.example[:1]) for m in (job.source.model, job.graph))
        speed = (
            f"{_millions(macs_now)} of {_millions(macs_before)} million MACs are left to compute, "
            "dense ones"
        )
    return Written(name, checked, speed, asdict(compared))


def macs_of(model: nn.Module, example: Tensor) -> int:
    """What dense kernels compute for one sample, zeros included."""
    return sum(b.macs_dense for b in layer_budgets(model, weight_uses(model, example)))


def _millions(macs: int) -> str:
    return f"{macs / 1e6:,.3g}"


def write_compact(job: Job, folder: Path) -> Written:
    path, model, values = folder / "model.sclc", job.source.model, job.options.values
    # Adding 0 turns −0, which w · mask leaves and which would be stored, into 0; no other bit.
    state = {k: v + 0 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    features = {c.name: 1 if c.transposed_groups else 0 for c in find_connections(model)}
    entries = save_compact(state, path, values=values, connections=features, metadata=job.about())
    dense = folder / "model.safetensors"
    if not dense.exists():
        # Only for its size: it is removed again below.
        dense = folder / ".weighed"
        save_sparse_model(model, dense, metadata=job.about())
    job.sizes = [asdict(size) for size in sizes(dense, path, entries, state)]
    (folder / ".weighed").unlink(missing_ok=True)
    checked = "read back, bit for bit"
    if values != "float32":
        checked = f"read back, bit for bit what {values} rounds to"
        _measure_rounded(job, features)
    speed = "a smaller file; loaded, it is dense again and as fast"
    return Written(path.name, checked, speed, {"values": values})


def _measure_rounded(job: Job, features: Mapping[str, int]) -> None:
    model = copy.deepcopy(job.source.model)
    state = {
        name: rounded(value, job.options.values, features[name]) if name in features else value
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    if job.measure("as trained", job.source.model) is not None:
        job.measure(f"compact, {job.options.values}", model)


def write_2_to_4(job: Job, folder: Path) -> Written:
    path, model, more = folder / "model.2to4.safetensors", job.source.model, {}
    if job.options.convert:
        model = copy.deepcopy(model)
        more = {"lost": to_semi_structured(model)}
        if job.measure("as trained", job.source.model) is None:
            raise UsageError(
                "--convert-2to4 changes the network, and there are no shards to measure that on: "
                "name them with --data"
            )
        job.measure("2:4, converted", model)
    layers = patterns(model)
    job.patterns = [asdict(p) | {"holds": p.holds, "qualifies": p.qualifies} for p in layers]
    _check_declared(job.source, {p.name: p for p in layers})
    holds = [p for p in layers if p.holds]
    taken = [p.name for p in layers if p.qualifies]
    if not holds or (job.options.convert and not taken):
        raise UsageError(_nothing_holds(layers, job.options.convert))
    save_sparse_model(model, path, metadata={**job.about(), "2:4": taken})
    return Written(
        path.name,
        f"read back; 2:4 holds in {len(holds)} of {len(layers)} layers",
        _speed_2_to_4(taken),
        more,
    )


def _check_declared(source: Source, layers: Mapping[str, Pattern]) -> None:
    """ExportError where a layer that was trained as 2:4 is not."""
    method = (source.recipe or {}).get("method") or {}
    if not method.get("n_m"):
        return
    groups = connection_groups(source.model, exclude=method.get("exclude") or (), n_m=method["n_m"])
    [group] = [group for group in groups if group["connections"]]
    for (name, _), n_m in zip(group["params"], group["n_m"], strict=True):
        if n_m == (2, 4) and name in layers and not layers[name].holds:
            raise ExportError(
                f"{name} was trained as 2:4, and {layers[name].broken:,} of its "
                f"{layers[name].blocks:,} blocks have more than two weights"
            )


def _nothing_holds(layers: list[Pattern], converted: bool) -> str:
    if converted:
        reasons = "; ".join(f"{p.name}: {p.hardware}" for p in layers[:3])
        return f"no layer of this model can run on sparse tensor cores ({reasons} …)"
    closest = min(layers, key=lambda p: p.broken / p.blocks if p.blocks else 1.0)
    return (
        f"no layer is 2:4 (closest: {closest.name}, {closest.broken:,} of {closest.blocks:,} "
        'blocks have more than two weights): train with method.n_m: "2:4", or let --convert-2to4 '
        "drop the smaller weights"
    )


def _speed_2_to_4(taken: list[str]) -> str:
    if not taken:
        return "none: PyTorch has no sparse tensor-core kernel for the layers that are 2:4"
    return (
        f"{len(taken)} Linear layers can run on sparse tensor cores (CUDA, half precision) by "
        "sclcore.export.load_semi_structured; elsewhere none. Not measured here: needs a GPU"
    )


WRITERS: dict[str, Callable[[Job, Path], Written]] = {
    "safetensors": write_safetensors,
    "state_dict": write_state_dict,
    "onnx": write_onnx,
    "torch": write_torch,
    "csv": write_csv,
    "compact": write_compact,
    "2:4": write_2_to_4,
}
