"""The tables of docs/formats.md: the space that the authors of HAM and sHAM published, on random
matrices of the same shapes.

    python docs/formats_table.py

Three matrices of the standard normal distribution in the shapes of VGG-19's dense layers, 512 →
4096 → 4096 → 10, of which the smallest p % are zeroed, and the values shared as the setting says.
No training: ψ follows from shapes, sparsity and how often each value is used. Sizes are counted as
`sclcore.export.huffman.sizes` does it; that files are as large is tested. Minutes, and 2 GB.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sclcore.export.huffman.sizes import Counts, csc, ham_bound, section_bytes, sham_bound
from sclcore.sharing import Sharing, shared_weight

SHAPES = ((4096, 512), (4096, 4096), (10, 4096))
SIZE = sum(out * inputs for out, inputs in SHAPES)


@dataclass(frozen=True)
class Row:
    """A published result: `pruned` %, then `values` for each matrix by `kind`, in `form`: its ψ."""

    data: str
    pruned: int
    kind: str
    values: tuple[int, ...]
    form: str
    published: float

    @property
    def setting(self) -> str:
        prune = f"Pr {self.pruned}" if self.pruned else ""
        share = {"kmeans": "WS", "pq": "PQ", "": ""}[self.kind]
        return " ".join(part for part in (prune, share, "-".join(map(str, self.values))) if part)


PUBLISHED = (
    Row("MNIST", 96, "", (), "csc", 0.08),
    Row("MNIST", 97, "", (), "csc", 0.06),
    Row("MNIST", 0, "kmeans", (128, 2, 32), "ham", 0.104),
    Row("MNIST", 0, "pq", (1024, 2, 32), "ham", 0.126),
    Row("MNIST", 96, "pq", (32, 128, 32), "sham", 0.026),
    Row("MNIST", 97, "pq", (32, 32, 2), "sham", 0.018),
    Row("MNIST", 96, "kmeans", (128, 32, 32), "sham", 0.039),
    Row("CIFAR-10", 60, "", (), "csc", 0.8),
    Row("CIFAR-10", 99, "", (), "csc", 0.02),
    Row("CIFAR-10", 0, "kmeans", (32, 32, 2), "ham", 0.306),
    Row("CIFAR-10", 98, "pq", (32, 2, 32), "sham", 0.012),
    Row("CIFAR-10", 99, "pq", (32, 2, 32), "sham", 0.006),
)


@dataclass(frozen=True)
class Found:
    """Words of 32 bits: what the formula allows, what a file has, what the authors' code counts."""

    bound: float
    file: float
    theirs: float


def matrix(number: int, pruned: int) -> Tensor:
    weight = torch.randn(SHAPES[number], generator=torch.Generator().manual_seed(number))
    if not pruned:
        # Some are 0 in float32, and would be a value of their own.
        return weight.where(weight != 0, 1e-7)
    magnitude = weight.abs().flatten()
    threshold = magnitude.kthvalue(magnitude.numel() * pruned // 100).values
    return weight.where(weight.abs() > threshold, 0.0)


def shared(weight: Tensor, kind: str, values: int) -> Tensor:
    return shared_weight(weight, Sharing(kind, values)) if kind else weight


def live_quantiles(values: int, pruned: int) -> int:
    """How many of `values` quantiles of all entries are not 0, where zeros lie in the middle."""
    return 2 * (1 + (100 - pruned) * (values - 1) // 200)


def theirs(row: Row, number: int, weight: Tensor) -> float:
    """Words as their code has it: each word of codewords counts twice, and quantiles are those of
    all entries, so that few of them are live."""
    values = row.values[number]
    if row.kind == "pq" and row.pruned:
        values = min(values, live_quantiles(values, row.pruned))
    sections = section_bytes(row.form, Counts.of(shared(weight, row.kind, values)))
    return (sum(sections) + sections[2]) / 4


def found(row: Row, number: int) -> Found:
    weight = matrix(number, row.pruned)
    if row.form == "csc":
        words = csc(Counts.of(weight)) * weight.numel()
        return Found(words, words, words)
    counts = Counts.of(shared(weight, row.kind, row.values[number]))
    bound = {"ham": ham_bound, "sham": sham_bound}[row.form](counts) * counts.size
    return Found(bound, sum(section_bytes(row.form, counts)) / 4, theirs(row, number, weight))


def line(row: Row) -> str:
    results = [found(row, number) for number in range(len(SHAPES))]
    cells = [row.data, row.setting, {"csc": "CSC", "ham": "HAM", "sham": "sHAM"}[row.form]]
    cells.append(f"{row.published:g}")
    for part in ("theirs", "bound", "file"):
        known = part != "file" or row.form != "csc"
        cells.append(f"{sum(getattr(r, part) for r in results) / SIZE:.4f}" if known else "")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    print(
        "| data | setting | format | published ψ | as their code counts | formula, at most | file |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in PUBLISHED:
        print(line(row), flush=True)


if __name__ == "__main__":
    main()
