"""What a product straight from the compressed form costs, against the dense one.

    python -m benchmarks.formats [--quick]

One Linear layer of 4096 × 4096 random weights, pruned to 4 %, with 32 values by k-means: y = x Wᵀ
by the dense weight, by torch's sparse CSR, and straight from HAM and sHAM, their codewords read in
C or by numpy. Timed in turn on one thread; quoted are medians of milliseconds. The last line is a
JSON object; its ratio is the time from sHAM to that of the dense product, for a batch of 1.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import in_turn, median, median_ratio, options_parser, parse, report, table
from sclcore.export.huffman import Ham, Sham
from sclcore.sharing import Sharing, shared_weight

DENSITY, VALUES = 0.04, 32
TARGET = 1.0

Product = Callable[[Tensor], Tensor]


def layer(size: int) -> Tensor:
    """[size, size], the largest of normally distributed weights, with few values."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    threshold = weight.abs().flatten().kthvalue(round((1 - DENSITY) * weight.numel())).values
    return shared_weight(weight.where(weight.abs() > threshold, 0.0), Sharing("kmeans", VALUES))


def products(weight: Tensor) -> tuple[dict[str, Product], dict[str, int]]:
    """Each way to multiply, and the bytes that it holds the weight in."""
    ham, sham = Ham.of(weight), Sham.of(weight)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        csr = weight.to_sparse_csr()
    parts = (csr.values(), csr.crow_indices(), csr.col_indices())
    ways: dict[str, Product] = {
        "dense": lambda x: x @ weight.T,
        "CSR": lambda x: (csr @ x.T).T,
        "HAM": ham.linear,
        "sHAM": sham.linear,
        "HAM, numpy": lambda x: without_c(ham.linear, x),
        "sHAM, numpy": lambda x: without_c(sham.linear, x),
    }
    coded = {"HAM": sum(map(len, ham.sections())), "sHAM": sum(map(len, sham.sections()))}
    held = {
        "dense": 4 * weight.numel(),
        "CSR": sum(part.numel() * part.element_size() for part in parts),
        **{name: coded[name.partition(",")[0]] for name in [*ways][2:]},
    }
    return ways, held


def without_c(product: Product, x: Tensor) -> Tensor:
    os.environ["SCL_FUSED"] = "0"
    try:
        return product(x)
    finally:
        del os.environ["SCL_FUSED"]


def main() -> None:
    options = parse(options_parser(__doc__))
    torch.set_num_threads(1)
    size, rounds = (512, 2) if options.quick else (4096, 7)
    device = torch.device("cpu")
    weight = layer(size)
    ways, held = products(weight)
    milliseconds: dict[int, dict[str, float]] = {}
    ratios: dict[int, dict[str, float]] = {}
    for batch in (1, 32):
        x = torch.randn(batch, size, generator=torch.Generator().manual_seed(batch))
        for way in ways.values():
            torch.testing.assert_close(way(x), x @ weight.T, rtol=1e-4, atol=1e-3)
        timed = in_turn({n: lambda w=w, x=x: w(x) for n, w in ways.items()}, device, rounds)
        milliseconds[batch] = {name: 1e3 * median(timed, name) for name in ways}
        ratios[batch] = {name: median_ratio(timed, name, "dense") for name in ways}
    rows = [
        [
            name,
            f"{held[name]:,}",
            *(f"{milliseconds[b][name]:.2f} ({ratios[b][name]:.1f}×)" for b in (1, 32)),
        ]
        for name in ways
    ]
    print(table(["", "bytes", "ms, batch 1", "ms, batch 32"], rows))
    report(
        "formats",
        ratio=ratios[1]["sHAM"],
        target=TARGET,
        device=device,
        details={"milliseconds": milliseconds, "bytes": held, "size": size},
    )


if __name__ == "__main__":
    main()
