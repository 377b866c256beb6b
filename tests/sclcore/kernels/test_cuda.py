"""The Triton step: interpreted, run on a GPU where there is one, compiled in any case."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sclcore.kernels.options import RATES

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
CASES = "tests/sclcore/kernels/triton_cases.py"


@pytest.mark.parametrize(
    ("interpreted", "tier"),
    [
        pytest.param(True, "not long", id="interpreter"),
        pytest.param(True, "long", id="interpreter, long", marks=pytest.mark.long),
        pytest.param(False, "not long", id="gpu"),
    ],
)
def test_agrees_with_the_reference(interpreted: bool, tier: str) -> None:
    if not interpreted and not torch.cuda.is_available():
        pytest.skip("no GPU")
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", tier, CASES],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def _compile(kernel: Any, arguments: dict[str, str], capability: int, **constants: Any) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [*arguments, *constants]
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    values = {(names.index(name),): value for name, value in constants.items()}
    # PyTorch's allocations are aligned, as a launch finds out.
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if "*" in kind
    }
    return triton.compile(
        ASTSource(kernel, signature, values, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "enable_fp_fusion": False},
    )


@pytest.mark.parametrize("capability", [75, 80, 90])
def test_compiles_for_gpus(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sclcore.kernels import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tables = {"pieces": "*i64", "gradients": "*i64"}
    proxy = {"PROXY": "softplus", "LEAKY_SLOPE": 0.1, "ROOT": True}
    names = {"tiles": "*i64", **tables, "out": "*fp32"}
    assert _compile(triton_kernels.sums, names, capability, **proxy).asm["cubin"]
    names = {"chunks": "*i64", **tables, "prices": "*fp32"}
    names |= {"divisors": "*fp32", "counts": "*i64"}
    names |= dict.fromkeys(RATES, "fp32")
    flags = {"NESTEROV": True, "LEARNS": True}
    made = _compile(triton_kernels.update, names, capability, **proxy, **flags)
    # Eight elements per thread, four at a time: g, w, m and two momenta in; w, m, both momenta and
    # v out. Element by element, a GPU reaches a good deal less of its bandwidth.
    assert made.asm["ptx"].count("ld.global.v4.b32") == 2 * 5
    assert made.asm["ptx"].count("st.global.v4.b32") == 2 * 5
