"""One export under way, and what is said of each of its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launcher.export.asked import Options
from launcher.export.sizes import Size, dense_sizes
from launcher.export.source import Source
from launcher.run.validate import evaluate
from sclcore import layer_budgets, weight_uses
from sclcore.export import save_sparse_model
from sclcore.network.connections import LayerBudget, find_connections

# A batch of one is a special case to PyTorch's tracer.
EXAMPLE_BATCH = 2


@dataclass
class Job:
    """One export under way. `graph` is what onnx and torch get: `source.model`, or less of it."""

    options: Options
    source: Source
    graph: nn.Module
    accuracy: dict[str, float] = field(default_factory=dict)
    sizes: list[dict[str, Any]] = field(default_factory=list)
    patterns: list[dict[str, Any]] = field(default_factory=list)

    def dense_state(self) -> dict[str, Tensor]:
        """The model's tensors for formats that leave out zeros. Adding 0 turns −0, which w · mask
        leaves and which would be stored, into 0; no other bit."""
        state = self.source.model.state_dict()
        return {k: v + 0 if v.is_floating_point() else v for k, v in state.items()}

    def add_sizes(self, folder: Path, rows: Sequence[Size]) -> None:
        """Rows for the table of sizes, below those of the dense file."""
        if not self.sizes:
            dense = folder / "model.safetensors"
            weighed = dense if dense.exists() else folder / ".weighed"
            if weighed is not dense:
                save_sparse_model(self.source.model, weighed, metadata=self.about())
            self.sizes = [asdict(size) for size in dense_sizes(weighed)]
            if weighed is not dense:
                weighed.unlink()
        self.sizes += [asdict(size) for size in rows]

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
        if what in self.accuracy:
            return self.accuracy[what]
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
