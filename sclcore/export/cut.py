"""A cut: which features of a network are kept, apart from the network and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from sclcore.export.files import ExportError


class Kept(BaseModel):
    """The indices of a dimension that stay, in ascending order, of `of` that there were."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    of: int = Field(ge=1, description="size of the dimension in the whole model")
    indices: list[int] = Field(min_length=1, description="what stays of it")

    @model_validator(mode="after")
    def _are_of_the_dimension(self) -> Self:
        ascending = all(a < b for a, b in zip(self.indices, self.indices[1:], strict=False))
        if not ascending or self.indices[0] < 0 or self.indices[-1] >= self.of:
            raise ValueError(f"the indices should ascend, each once, from 0 to {self.of - 1}")
        return self


class Cut(BaseModel):
    """What makes a smaller network of a model: the features of each tensor that are kept.

    Tensors and dimensions that are not named stay whole. `sclcore.export.cutting.apply_cut` does
    it, for random weights as well as for given ones; `model_dump_json` and `model_validate_json`
    are its file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(default="", description="the model it belongs to, as a recipe names it")
    kept: dict[str, dict[int, Kept]] = Field(
        default_factory=dict, description="parameter or buffer → dimension → what is kept of it"
    )
    groups: dict[str, int] = Field(
        default_factory=dict, description="grouped convolution → groups that are left"
    )
    heads: dict[str, int] = Field(
        default_factory=dict, description="attention module → heads that are left"
    )

    def then(self, other: Cut) -> Cut:
        """The cut of the whole model that does what this one does, and then `other`.

        ExportError where `other` is of a network of another size.
        """
        kept = {name: dict(dims) for name, dims in self.kept.items()}
        for name, dims in other.kept.items():
            mine = kept.setdefault(name, {})
            for dim, later in dims.items():
                mine[dim] = _of_kept(name, dim, mine.get(dim), later)
        return Cut(
            model=self.model or other.model,
            kept=kept,
            groups=self.groups | other.groups,
            heads=self.heads | other.heads,
        )

    def of_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the whole model with what is kept of them; other tensors stay as they are."""
        return {name: self._of_tensor(name, tensor) for name, tensor in state.items()}

    def _of_tensor(self, name: str, tensor: Tensor) -> Tensor:
        for dim, kept in self.kept.get(name, {}).items():
            if dim < tensor.ndim and tensor.shape[dim] == kept.of:
                tensor = tensor.index_select(dim, torch.tensor(kept.indices, device=tensor.device))
        return tensor


def _of_kept(name: str, dim: int, earlier: Kept | None, later: Kept) -> Kept:
    if earlier is None:
        return later
    if later.of != len(earlier.indices):
        raise ExportError(
            f"a cut of {later.of} features cannot follow one that leaves {len(earlier.indices)} "
            f"(dimension {dim} of {name})"
        )
    return Kept(of=earlier.of, indices=[earlier.indices[i] for i in later.indices])
