"""The compiled step on CPUs against the reference, and what it does without a compiler."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from sclcore import SCL, connection_groups
from sclcore.kernels import compiler, cpu, find
from sclcore.kernels.options import Options
from sclcore.kernels.proxies import PROXIES
from sclcore.layout.geometry import Geometry
from tests.sclcore.kernels.steps import ALL_OPTIONS, CUT, WHOLE, check_steps, label, make_pieces
from tests.sclcore.nets import Mixed, mixed_batches, train

SOURCE = Path(cpu.__file__).with_name("cpu.c")


def _compilers() -> bool:
    try:
        return bool(compiler.find_compiler())
    except OSError:
        return False


needs_compiler = pytest.mark.skipif(not _compilers(), reason="no C compiler")


@pytest.fixture(scope="module")
def kernel() -> cpu.CpuKernel:
    return cpu.CpuKernel()


@needs_compiler
@pytest.mark.parametrize("options", ALL_OPTIONS, ids=label)
def test_agrees_with_the_reference(kernel: cpu.CpuKernel, options: Options) -> None:
    flips, revivals = check_steps(kernel, options, [*WHOLE, *CUT], steps=50)
    # The comparison means something only where masks moved; 20 thousand weights.
    assert flips >= 1000 if options.mask_lr else flips == 0
    if options.mask_lr and PROXIES[options.proxy].positive:
        assert revivals >= 30


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_writes_parameters_of_less_precision(kernel: cpu.CpuKernel, dtype: torch.dtype) -> None:
    options = next(o for o in ALL_OPTIONS if o.momentum and o.mask_lr)
    check_steps(kernel, options, [*WHOLE, *CUT], steps=10, dtype=dtype)


@needs_compiler
def test_results_do_not_depend_on_threads(
    kernel: cpu.CpuKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = next(o for o in ALL_OPTIONS if o.momentum and o.mask_lr)
    monkeypatch.setattr(cpu, "_WEIGHTS_PER_THREAD", 100)
    grads = [torch.randn(p.length) for p in make_pieces([*WHOLE, *CUT], momentum=True)]
    found = []
    for threads in (1, 2, 7):
        pieces = make_pieces([*WHOLE, *CUT], momentum=True)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        sums = kernel.sums(pieces, grads, [options] * len(pieces))
        counts = kernel.update(pieces, grads, [options] * len(pieces), sums.sqrt() + 1e-12)
        found.append([sums, counts, *(p.mask for p in pieces), *(p.param for p in pieces)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_compiler
def test_fills_targets_and_tells_autograd(kernel: cpu.CpuKernel) -> None:
    [piece] = make_pieces([(Geometry("conv", (4, 3, 2, 2)), 0, None)], momentum=True)
    piece.target = torch.empty(3, 4, 2, 2).transpose(0, 1)
    leaf = torch.ones(48, requires_grad=True)
    loss = (leaf * piece.param).sum()
    options = [ALL_OPTIONS[0]]
    kernel.update([piece], [torch.ones(48)], options, torch.ones(4))
    assert torch.equal(piece.target, piece.param.view(4, 3, 2, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_compiler
def test_training_is_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Mixed(attention=False)
    found: list[tuple[nn.Module, SCL]] = []
    for fused in ("0", "1"):
        monkeypatch.setenv("SCL_FUSED", fused)
        mine = copy.deepcopy(model)
        optimizer = SCL(connection_groups(mine), lr=0.05, lam=0.05, mask_lr=0.02, weight_decay=1e-3)
        train(mine, optimizer, mixed_batches(torch.float32) * 5)
        found.append((mine, optimizer))
    (plain, first), (fused_one, second) = found
    assert 0 < sum(first.live_connections().values()) < 138
    assert first.mask_hash() == second.mask_hash()
    for a, b in zip(plain.parameters(), fused_one.parameters(), strict=True):
        # 50 steps of float32, whose last bits grow a little as they go through the network.
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-4)


@needs_compiler
def test_a_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", compiler.find_compiler()[0])
    with ThreadPoolExecutor(2) as pool:  # as ranks that start at the same time
        assert all(pool.map(compiler.load, [SOURCE] * 2))
    assert len([*compiler.cache().iterdir()]) == 1

    def refuse(command: list[str]) -> None:
        raise AssertionError(f"compiled again: {command}")

    monkeypatch.setattr(compiler, "_compile", refuse)
    assert compiler.load(SOURCE)


@needs_compiler
def test_works_where_nothing_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "no folder"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert compiler.load(SOURCE).scl_sums


def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")


def _failing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")


@pytest.mark.parametrize("prepare", [_no_compiler, _failing_compiler])
def test_without_a_compiler_the_reference_is_used(
    prepare: Callable[[pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SCL_FUSED", raising=False)
    prepare(monkeypatch)
    find._kernel.cache_clear()
    with caplog.at_level(logging.INFO):
        assert find.find_kernel(torch.device("cpu")) is None
        assert find.find_kernel(torch.device("cpu")) is None
    find._kernel.cache_clear()
    assert len(caplog.records) == 1


def test_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCL_FUSED", "0")
    assert find.find_kernel(torch.device("cpu")) is None
