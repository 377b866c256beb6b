"""`scl bench` times what it says it times, and says what it does not."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from launcher.bench.forms import CsrLinear, forms
from launcher.bench.memory import measured
from launcher.bench.timing import latencies
from launcher.cli import main
from launcher.export.source import Described, open_source
from launcher.models import SmallConvNet

Output = pytest.CaptureFixture[str]


@pytest.fixture
def sparse_model(tmp_path: Path) -> Path:
    """A small ConvNet with a tenth of its weights, and filters that are dead."""
    torch.manual_seed(0)
    model = SmallConvNet(width=8).eval()
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.ndim > 1):
            weight.copy_(weight.where(torch.rand_like(weight) < 0.1, 0.0))
        model.features[3].weight[:5].zero_()  # type: ignore[index]
        model.features[4].bias.fill_(-0.1)  # type: ignore[union-attr]
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    return path


NAMED = ["--model", "small_convnet", "--kwarg", "width=8", "--image-size", "8"]


def test_a_table_and_a_line_of_json(sparse_model: Path, capsys: Output) -> None:
    threads = torch.get_num_threads()
    options = ["--batch", "1,4", "--rounds", "2", "--threads", "1,2", "--device", "cpu"]
    assert main(["bench", str(sparse_model), *NAMED, *options]) == 0
    out = capsys.readouterr().out
    report: dict[str, Any] = json.loads(out.splitlines()[-1])
    ran = {row["form"] for row in report["milliseconds"]}
    assert ran == {
        "as trained",
        "without a zero",
        "dead features removed",
        "Linear as sparse CSR",
        "onnxruntime",
        "onnxruntime, removed",
        "native",
    } | {name for name in ("openvino",) if importlib.util.find_spec(name)}
    assert report["not_run"]["2:4"] == "needs a GPU" and "not run: 2:4: needs a GPU" in out
    assert {*report["not_run"]} <= {"2:4", "openvino"}
    assert 0 < report["bytes"]["native"] < report["bytes"]["onnxruntime"] / 2
    assert len(report["milliseconds"]) == 2 * 2 * len(ran)
    for row in report["milliseconds"]:
        assert 0 < row["p5"] <= row["median"] <= row["p95"]
        assert row["ratio"] == 1 or row["form"] != "as trained"
    assert report["macs"]["live"] < report["macs"]["dense"] and 0 < report["density"] < 0.12
    assert report["threads"] == [1, 2] and not report["memory"] and "cores" in report["machine"]
    assert "native, which leaves them out" in out
    assert torch.get_num_threads() == threads


def test_every_form_computes_the_same_network(sparse_model: Path, tmp_path: Path) -> None:
    source = open_source(sparse_model, Described("small_convnet", {"width": 8}, 8))
    images = torch.randn(3, 1, 8, 8)
    expected = source.model(images).detach()
    for form in forms(source, torch.device("cpu"), tmp_path):
        if form.open is None:
            continue
        run = form.open(1)
        with torch.no_grad():
            found = run(images)
        assert isinstance(found, torch.Tensor) and found.shape == expected.shape
        difference = (found - expected).abs().max() / expected.abs().max()
        if form.name == "without a zero":
            assert difference > 0.01
            assert all(bool((p != 0).all()) for p in run.parameters() if p.ndim > 1)  # type: ignore[union-attr]
        else:
            assert difference < 1e-5, form.name


def test_the_memory_of_an_engine_is_its_own(sparse_model: Path, tmp_path: Path) -> None:
    """In a process that imports no other engine; more images at a time take more."""
    source = open_source(sparse_model, Described("small_convnet", {"width": 8}, 8))
    native = next(f for f in forms(source, torch.device("cpu"), tmp_path) if f.name == "native")
    assert native.file is not None
    found = {}
    for batch in (1, 64):
        images = tmp_path / f"{batch}.npy"
        np.save(images, np.zeros((batch, 1, 8, 8), np.float32))
        found[batch] = measured("native", native.file, images, 1)
    # An interpreter with numpy has 30 to 40 MB, with torch 200 and more.
    assert 10e6 < found[1].before < found[1].peak < 80e6
    # The maps of 64 images, of 8 and more channels, in float32; and not their every layer's.
    more = found[64].peak - found[64].before - (found[1].peak - found[1].before)
    assert 64 * 8 * 64 * 4 < more < 20e6
    with pytest.raises(OSError, match=r"native in a process of its own: .*cannot be read"):
        measured("native", tmp_path / "gone.scln", images, 1)


@pytest.mark.long
def test_memory_beside_latency(sparse_model: Path, capsys: Output) -> None:
    options = ["--batch", "1", "--rounds", "1", "--threads", "1", "--device", "cpu", "--memory"]
    assert main(["bench", str(sparse_model), *NAMED, *options]) == 0
    out = capsys.readouterr().out
    report: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert "MB at the peak, beyond imports (in all)" in out
    rows = {row["form"]: row for row in report["memory"]}
    assert rows.keys() == {row["form"] for row in report["milliseconds"]}
    assert all(0 < row["before"] <= row["peak"] for row in rows.values())
    # Of the two libraries one is torch.
    assert rows["native"]["peak"] < rows["as trained"]["peak"] / 2


@torch.no_grad()
def test_csr_linear_is_linear() -> None:
    linear = nn.Linear(20, 7)
    linear.weight.copy_(linear.weight.where(torch.rand(7, 20) < 0.2, 0.0))
    sparse = CsrLinear(linear)
    assert int(sparse.weight.values().numel()) == int(torch.count_nonzero(linear.weight))
    tokens = torch.randn(2, 5, 20)
    assert torch.allclose(sparse(tokens), linear(tokens), atol=1e-6)


def test_all_forms_are_timed_in_every_round() -> None:
    """In turn, and every other round backwards; a timing repeats a short call."""
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("a", "b", "c")}
    found = latencies(calls, 4, torch.device("cpu"))
    runs = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    # Warm-up of each, then abc, cba, abc, cba; neighbours that are alike are one run.
    assert "".join(runs) == "abc" + "abcbabcba"
    assert found["a"].ratio == 1 and found["b"].p5 <= found["b"].median <= found["b"].p95


def test_bad_input_is_one_sentence(sparse_model: Path, capsys: Output) -> None:
    for options, message in (
        (["--batch", "0"], "--batch is 0; it must be at least 1"),
        (["--batch", "x"], "--batch x: should be numbers"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--threads", "2,0"], "--threads is 0"),
        (["--threads", "many"], "--threads many: should be numbers"),
    ):
        assert main(["bench", str(sparse_model), *NAMED, *options]) == 2
        assert message in capsys.readouterr().err
    assert main(["bench", str(sparse_model.parent / "gone")]) == 2
    assert "there is no" in capsys.readouterr().err


def test_processor_time_leaves_out_what_is_no_work() -> None:
    """Sleeping is seen by the clock on the wall alone."""
    sleeping = {"sleep": lambda: time.sleep(0.02)}
    wall = latencies(sleeping, 2, torch.device("cpu"))["sleep"].median
    work = latencies(sleeping, 2, torch.device("cpu"), time.thread_time)["sleep"].median
    # A call of sleep costs some microseconds of work.
    assert wall >= 20 and work < 2
