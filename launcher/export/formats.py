"""The formats of `scl export`: how each is written, and what it is good for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from launcher.errors import UsageError
from launcher.export.job import Job, Written
from launcher.export.shared import write_ham, write_sham
from launcher.export.sizes import Size, compact_sizes
from launcher.export.source import Source
from sclcore import connection_groups, layer_budgets, weight_uses
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
from sclcore.export.native import save_native
from sclcore.export.semi_structured import Pattern, patterns, to_semi_structured
from sclcore.export.values import rounded
from sclcore.network.connections import find_connections

_DENSE = "zeros are stored and multiplied like other numbers: as large and as slow as dense"
# Of the MACs of a network: docs/runtime.md, where the sparse kernel meets a dense engine.
_DENSE_FROM = 0.4


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


def write_native(job: Job, folder: Path) -> Written:
    model = _single(job.graph)
    compared = save_native(model, folder, job.example, job.about())
    path = folder / "model.scln"
    job.add_sizes(folder, [Size("native", path.stat().st_size)])
    budgets = job.budgets(model)
    total, live = (sum(getattr(b, key) for b in budgets) for key in ("macs_dense", "macs"))
    speed = (
        f"{_millions(live)} of {_millions(total)} million MACs are computed on the CPU: "
        "scl bench says what that gains here"
    )
    if live > _DENSE_FROM * total:
        speed += "; a network so dense is slower than in a dense engine"
    return Written(path.name, _ran(compared), speed, asdict(compared))


def _single(model: nn.Module) -> nn.Module:
    """`model` in float32, which every runtime has on every machine."""
    if all(p.dtype == torch.float32 for p in model.parameters()):
        return model
    return copy.deepcopy(model).float()


def _graph(name: str, compared: Compared, job: Job) -> Written:
    speed = _DENSE
    if job.graph is not job.source.model:
        macs_before, macs_now = (macs_of(m, job.example[:1]) for m in (job.source.model, job.graph))
        speed = (
            f"{_millions(macs_now)} of {_millions(macs_before)} million MACs are left to compute, "
            "dense ones"
        )
    return Written(name, _ran(compared), speed, asdict(compared))


def _ran(compared: Compared) -> str:
    return (
        f"run again: outputs differ by {compared.difference:.1e}, "
        f"the largest is {compared.scale:.2g}"
    )


def macs_of(model: nn.Module, example: Tensor) -> int:
    """What dense kernels compute for one sample, zeros included."""
    return sum(b.macs_dense for b in layer_budgets(model, weight_uses(model, example)))


def _millions(macs: int) -> str:
    return f"{macs / 1e6:,.3g}"


def write_compact(job: Job, folder: Path) -> Written:
    path, model, values = folder / "model.sclc", job.source.model, job.options.values
    state = job.dense_state()
    features = {c.name: 1 if c.transposed_groups else 0 for c in find_connections(model)}
    entries = save_compact(state, path, values=values, connections=features, metadata=job.about())
    job.add_sizes(folder, compact_sizes(path, entries, state))
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
    "native": write_native,
    "csv": write_csv,
    "compact": write_compact,
    "ham": write_ham,
    "sham": write_sham,
    "2:4": write_2_to_4,
}
