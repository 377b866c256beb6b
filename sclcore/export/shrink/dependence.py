"""Units whose activations are linear combinations of others' go; their readers take them over.

Shah, Olivier and Raj (arXiv 2005.14070): with Z the activations that a layer reads, a column each,
and a constant column, Z_gone ≈ Z_kept B; then W_kept ← W_kept + W_gone Bᵀ computes the same
without them. Their code solves for every column once and then mends the solutions column by column,
which is inexact from the second on; here the columns that go are solved for on those that stay, all
at once, by least squares. Units that several layers read have their own B in each.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sclcore.export.cutting import apply_cut
from sclcore.export.files import ExportError
from sclcore.export.shrink.units import Reader, Units

_ROUNDINGS = 100
_LEAST = 1e-8  # what least squares of float64 tell of some thousand columns
_SQUARED = 1e-11  # the same of a Gram matrix, squared
_RIDGE = 1e-14


def exact_residual(dtype: torch.dtype) -> float:
    """The relative residual (2-norms) below which a column counts as dependent on others.

    A hundred roundings of the network's own weights: 1.2e-5 in float32.
    """
    return max(_LEAST, _ROUNDINGS * torch.finfo(dtype).eps)


@dataclass
class _Read:
    """What one layer reads. `factor`: R of the QR of its inputs [rows, columns (+ 1)].

    `inverse` is of the Gram matrix of the columns that are left, each scaled to length 1, and of
    the constant; `weight` [out, columns] adds up what the taps of a convolution see of a column.
    """

    reader: Reader
    factor: Tensor
    constant: bool
    weight: Tensor
    inverse: Tensor
    energy: float
    scale: Tensor


@dataclass(frozen=True)
class Dependent:
    """What can go: bool [units]; `error`, relative squared error of the outputs of the readers."""

    gone: Tensor
    error: float


class Dependences:
    """The linear dependences among what the layers of `model` read of `batches` of images.

    They hold on these images: ExportError where some layer reads fewer than twice as many rows
    (images, or places of them) as it has columns, of which all would seem dependent. The constant
    column is used where a reader has a bias, and no padding: beside
    an image there are zeros, where a constant is not constant.
    """

    def __init__(self, model: nn.Module, units: Units, batches: Iterable[Tensor]) -> None:
        self._model, self._units = model, units
        self._exact = exact_residual(next(model.parameters()).dtype)
        exact = copy.deepcopy(model).eval().requires_grad_(False).double()
        factors: dict[str, Tensor] = {}
        rows: dict[str, int] = {}
        handles = []
        readers = {r.weight: r for r in units.readers}
        for reader in readers.values():
            module = exact.get_submodule(reader.module)
            constant = not reader.padded and getattr(module, "bias", None) is not None
            hook = partial(_gather, reader, constant, factors, rows)
            handles.append(module.register_forward_pre_hook(hook))
        with torch.no_grad():
            for images in batches:
                exact(images.double())
        for handle in handles:
            handle.remove()
        _check_rows(rows, factors)
        self._reads = [self._read(exact, readers[w], factor) for w, factor in factors.items()]

    def _read(self, exact: nn.Module, reader: Reader, factor: Tensor) -> _Read:
        weight = exact.get_parameter(reader.weight).detach()
        columns = len(reader.units)
        constant = factor.shape[1] > columns
        # Beyond its number of columns a factor has only zeros.
        scale = factor.norm(dim=0).clamp_min(1e-300)
        scaled = factor / scale
        gram = scaled.T @ scaled
        inverse = torch.linalg.inv(gram + _RIDGE * len(gram) * torch.eye(len(gram)).double())
        taps = weight.flatten(2).norm(dim=2) if weight.ndim > 2 else weight
        summed = taps * scale[:columns]
        energy = float((taps @ factor[:, :columns].T).square().sum()) or 1.0
        return _Read(reader, factor, constant, summed, inverse, energy, scale)

    def find(self, most: int, error: float | None = None) -> Dependent:
        """At most `most` units, one by one that whose loss its readers can mend best.

        `error` is the largest relative squared error of a reader's outputs that one may make; None:
        only what is exact within rounding goes. One feature of each tensor stays.
        """
        loose = max(_SQUARED, (10 * self._exact) ** 2)
        staying = torch.zeros(self._units.count, dtype=torch.bool)
        while True:
            found = self._search(most, loose if error is None else error, staying)
            if error is not None:
                return found
            wrong = self._inexact(found.gone)
            if not wrong.any():
                return found
            staying |= wrong

    def _search(self, most: int, error: float, staying: Tensor) -> Dependent:
        reads = [copy.copy(r) for r in self._reads]
        gone = torch.zeros(self._units.count, dtype=torch.bool)
        costs = torch.stack([_costs(r, self._units.count) for r in reads])
        dimensions = [units for *_, units in self._units.dimensions() if (units >= 0).all()]
        worst = 0.0
        for _ in range(most):
            total = costs.sum(0).masked_fill(gone | staying, torch.inf)
            unit = int(total.argmin())
            if not float(total[unit]) <= error:
                break
            left = ~gone
            left[unit] = False
            if any(bool((u == unit).any()) and not left[u].any() for u in dimensions):
                staying = staying.clone()
                staying[unit] = True
                continue
            gone[unit], worst = True, max(worst, float(total[unit]))
            for place, read in enumerate(reads):
                columns = (read.reader.units == unit).nonzero().flatten()
                if len(columns):
                    read.inverse = _without(read.inverse, columns)
                    costs[place] = _costs(read, self._units.count, gone)
        return Dependent(gone, worst)

    def _inexact(self, gone: Tensor) -> Tensor:
        """Units of `gone` that some reader cannot make from what is left, by its QR factor."""
        wrong = torch.zeros(self._units.count, dtype=torch.bool)
        for read in self._reads:
            away, stays, solution = _solve(read, gone)
            rest = read.factor[:, away] - read.factor[:, stays] @ solution
            relative = rest.norm(dim=0) / read.scale[away]
            wrong[read.reader.units[away[relative > self._exact]]] = True
        return wrong

    def remove(self, gone: Tensor) -> nn.Module:
        """A copy of the model without the units `gone`, their part taken over by their readers."""
        smaller = copy.deepcopy(self._model).eval()
        with torch.no_grad():
            for read in self._reads:
                _hand_over(smaller, read, gone)
        apply_cut(smaller, self._units.cut(gone))
        return smaller


@torch.no_grad()
def _gather(
    reader: Reader,
    constant: bool,
    factors: dict[str, Tensor],
    rows: dict[str, int],
    module: nn.Module,
    inputs: tuple[Any, ...],
) -> None:
    """Add a batch to the QR factor of what `reader` reads: R of [R; rows] is R of all rows."""
    x = inputs[0].movedim(reader.dim, -1)
    read = x.reshape(-1, x.shape[-1])
    rows[reader.weight] = rows.get(reader.weight, 0) + len(read)
    if constant:
        read = torch.cat([read, torch.ones(len(read), 1, dtype=read.dtype)], 1)
    if (known := factors.get(reader.weight)) is not None:
        read = torch.cat([known, read])
    factors[reader.weight] = torch.linalg.qr(read, mode="r").R


def _check_rows(rows: dict[str, int], factors: dict[str, Tensor]) -> None:
    for weight, factor in factors.items():
        if rows[weight] < 2 * factor.shape[1]:
            raise ExportError(
                f"of the {factor.shape[1]} columns that {weight} reads, {rows[weight]} rows say "
                "too little: all would seem to depend on each other; take more images (--samples), "
                "twice as many as columns at least"
            )


def _costs(read: _Read, count: int, gone: Tensor | None = None) -> Tensor:
    """Relative squared error of the reader's outputs where a unit went, after the best mending.

    Of a column j it is ‖w_j‖² / (G⁻¹)_jj, of several that go together the trace with the inverse of
    that block of G⁻¹.
    """
    units = read.reader.units
    costs = torch.zeros(count, dtype=torch.float64)
    mine = units >= 0
    if gone is not None:
        mine = mine & ~gone[units.clamp_min(0)]
    columns = mine.nonzero().flatten()
    own = units[columns]
    numbers = torch.bincount(own, minlength=count)
    single = numbers[own] == 1
    diagonal = read.inverse.diagonal()[columns[single]].clamp_min(1e-300)
    costs[own[single]] = read.weight[:, columns[single]].square().sum(0) / diagonal
    for unit in own[~single].unique().tolist():
        block = columns[own == unit]
        covariance = torch.linalg.pinv(read.inverse[block][:, block], hermitian=True)
        weight = read.weight[:, block]
        costs[unit] = ((weight @ covariance) * weight).sum().clamp_min(0)
    return costs / read.energy


def _without(inverse: Tensor, columns: Tensor) -> Tensor:
    """The inverse of the Gram matrix once `columns` are none of it (they are left as zeros)."""
    block = torch.linalg.pinv(inverse[columns][:, columns], hermitian=True)
    less = inverse - inverse[:, columns] @ block @ inverse[columns]
    less[columns], less[:, columns] = 0.0, 0.0
    return less


def _solve(read: _Read, gone: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns that go, columns that stay (with the constant), and B: Z_gone ≈ Z_stay B."""
    units = read.reader.units
    going = (units >= 0) & gone[units.clamp_min(0)]
    away = going.nonzero().flatten()
    stays = (~going).nonzero().flatten()
    if read.constant:
        stays = torch.cat([stays, torch.tensor([len(units)])])
    scaled = read.factor / read.scale
    # gelsy copes with columns that depend on each other still.
    found = torch.linalg.lstsq(scaled[:, stays], scaled[:, away], driver="gelsy").solution
    return away, stays, found * read.scale[away] / read.scale[stays][:, None]


def _hand_over(model: nn.Module, read: _Read, gone: Tensor) -> None:
    """Add to the weights of the columns that stay, and to the bias, what those that go gave."""
    away, stays, solution = _solve(read, gone)
    if not len(away):
        return
    module: Any = model.get_submodule(read.reader.module)
    weight = module.weight.detach().double()
    lost = weight[:, away].flatten(2) if weight.ndim > 2 else weight[:, away].unsqueeze(2)
    columns = solution
    if read.constant:
        # A constant reaches an output through every tap of the kernel.
        module.bias.add_((lost.sum(2) @ solution[-1]).to(module.bias.dtype))
        stays, columns = stays[:-1], solution[:-1]
    given = torch.einsum("oat,sa->ost", lost, columns)
    weight[:, stays] += given.reshape(weight[:, stays].shape)
    module.weight.copy_(weight)
