"""The benchmarks run and say what they promise; what they time is theirs to report, not judged."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks import runtime_tables
from benchmarks.common import in_turn, median, median_ratio
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.process import forked
from benchmarks.reparametrised import Settings, check_same_training
from benchmarks.run_hours import DOCUMENT, Machine, documented, machine_of, read_options, run_of
from benchmarks.scaling import Model, Network, count_bytes, message_bytes
from tests.launcher.conftest import finish, launch

# Half a minute each on an idle machine; started processes are many, so a busy one is far slower.
pytestmark = pytest.mark.timeout(600)


def run(benchmark: str, *arguments: str, also: set[str] | None = None) -> dict[str, Any]:
    """What the last line of a quick run says, checked for what all of them must say."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--quick", *arguments]
    code, output = finish(launch(command), timeout=500)
    assert code == 0, output
    result = json.loads(output.splitlines()[-1])
    everywhere = {"benchmark", "ratio", "target", "machine", "details"}
    assert result.keys() == everywhere | (also or set())
    assert result["benchmark"] == benchmark
    assert 0 < result["ratio"] < math.inf
    assert 0 < result["target"] < math.inf
    assert f"torch {torch.__version__}" in result["machine"]
    return result


@pytest.mark.long
def test_optimizer_step() -> None:
    assert run("optimizer_step")["details"]["milliseconds"].keys() == {
        "sgd",
        "scl",
        "held",
        "frozen",
    }


@pytest.mark.long
def test_reading() -> None:
    result = run("reading")
    rows = {row["nodes"]: row for row in result["details"]["rows"]}
    # One node reads what there is; of 14 each its share, in stretches and in pieces of shards, and
    # more of them where whole shards are fetched.
    assert rows[1]["stretches"] == pytest.approx(1, abs=0.01)
    assert rows[14]["most_stretches"] < rows[14]["most_pieces"] < result["target"]
    assert 1 < rows[14]["whole_2048"] < rows[14]["whole_256"] < 3


@pytest.mark.long
def test_overhead() -> None:
    result = run("overhead")
    (step,) = result["details"]["steps"]
    assert result["ratio"] == pytest.approx(step["time_ratio"], abs=1e-6)
    assert step["scl_ms"] > 0
    assert step["dense_ms"] > 0
    # Three tensors more of the 3.5 M weights are 42 MB; resident memory is exact to a few MB.
    assert 35 < step["scl_mb"] - step["dense_mb"] < 80


@pytest.mark.long
def test_communication() -> None:
    result = run("communication")
    counts = {count["stage"]: count for count in result["details"]["counts"]}
    whole = counts[0]
    # One all-reduce of the gradient: 3,504,872 parameters in float32, for both alike.
    assert whole["dense"]["kinds"] == {"allreduce": 4 * 3_504_872}
    assert whole["scl"]["kinds"] == whole["dense"]["kinds"]
    assert whole["scl"]["collectives"] == whole["dense"]["collectives"] == 1
    for stage in counts.keys() - {0}:
        scl, dense = counts[stage]["scl"], counts[stage]["dense"]
        assert scl["collectives"] == dense["collectives"] + 2
        # What benchmarks.scaling takes for SCL's own messages, at 53 layers.
        own = message_bytes(layers=53, ranks=2) + count_bytes(layers=53)
        # In stage 3 each layer is cut by itself, and with it a feature of each.
        cut = 4 * 53 if stage == 3 else 0
        assert 0 < scl["bytes"] - dense["bytes"] <= own + cut
    assert result["ratio"] == pytest.approx(max(c["ratio"] for c in counts.values()), abs=1e-6)
    assert 1 <= result["ratio"] <= result["target"]


@pytest.mark.long
def test_stages() -> None:
    """8.5 M weights of ViT-B's width on two ranks: what is shared out shows in what they hold."""
    stages = {row["stage"]: row for row in run("stages")["details"]["stages"]}
    between = [stages[stage]["between"] for stage in (0, 1, 2)]
    assert between == sorted(between, reverse=True)
    weights = 4 * 8.5e6
    # Of four tensors of state half each, in stages 1 and up; of the gradients, in 2.
    assert between[0] - between[1] > weights and between[1] - between[2] > weights
    # What was foretold, but for activations and messages.
    for row in stages.values():
        assert 0.9 * row["foretold"] < row["peak"] < row["foretold"] + 100e6


@pytest.mark.long
def test_reparametrised() -> None:
    (step,) = run("reparametrised")["details"]["steps"]
    assert step["theirs_ms"] > 0
    assert step["ours_ms"] > 0
    assert step["theirs_mb"] > 0
    assert step["ours_mb"] > 0
    # Nearly all parameters are connections, and each of these has a second gradient there.
    assert 1.9 < step["bytes_ratio"] < 2


@pytest.mark.long
def test_checkpoint(tmp_path: Path) -> None:
    details = run("checkpoint", "--folder", str(tmp_path))["details"]
    # ResNet-50's weights and statistics, and four tensors more for nearly each of its weights.
    assert 480e6 < details["bytes"] < 520e6
    assert details["seconds"].keys() == {"alone", "beside", "copy", "waited", "cost"}
    assert details["seconds"]["copy"] > 0
    # Nothing is left of what was written.
    assert [*tmp_path.iterdir()] == []


def test_the_document_has_the_hours_that_its_command_makes() -> None:
    options = read_options([])
    assert documented(machine_of(options), options.epochs) in DOCUMENT.read_text()


@pytest.mark.long
def test_scaling(tmp_path: Path) -> None:
    figure = tmp_path / "scaling.png"
    details = run("scaling", "--out", str(figure))["details"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert details["measured_seconds"].keys() == {"1", "2"}
    for shares in details["modelled_efficiency"].values():
        assert 0 < shares["scl"] <= 1
        assert 0 < shares["dense"] <= 1
    assert details["assumptions"]


@pytest.mark.long
def test_loader() -> None:
    ratios = {"ratio_to_decode_limit", "ratio_to_best_peer"}
    result = run("loader", also=ratios | {"target_to_best_peer"})
    [rates] = result["details"]["rates"]
    assert rates["images_per_s"].keys() == {"limit", "ours", "webdataset", "timm", "torchvision"}
    assert all(rate > 0 for rate in rates["images_per_s"].values())
    assert all(result[name] == pytest.approx(rates[name], abs=1e-6) for name in ratios)
    # Photographs of ImageNet's size, and a plan that does not grow with the number of shards.
    assert 80_000 < result["details"]["bytes_per_image"] < 130_000
    assert sum(result["details"]["costs"]["large_memory_mb"].values()) < 50


@pytest.mark.long
def test_decoding() -> None:
    details = run("decoding")["details"]
    assert all(taken > 0 for taken in details["milliseconds"].values())
    mean, largest = zip(*details["differences"].values(), strict=True)
    assert max(mean) < 3 and max(largest) < 64
    for exact in ("simplejpeg", "Pillow", "rows to the crop's end", "the crop alone"):
        # The last is there if data/images/_crop.c could be built.
        assert details["differences"].get(exact, [0, 0]) == [0, 0]
    assert details["differences"]["torchvision, uint8"][1] <= 1


@pytest.mark.long
def test_startup() -> None:
    details = run("startup")["details"]
    for taken in details["seconds"].values():
        assert all(seconds >= 0 for seconds in taken.values())
        stages = [v for name, v in taken.items() if not name.startswith("to ")]
        assert sum(stages) == pytest.approx(taken["to first update"] + taken["to prompt"])
    assert all(seconds > 0 for seconds in details["commands"].values())


@pytest.mark.long
def test_telemetry() -> None:
    result = run("telemetry")
    [each] = result["details"].values()
    assert result["ratio"] == pytest.approx(each["ratio"], abs=1e-6)
    assert each["telemetry_ms"] > 0
    assert each["ratio"] == pytest.approx(1 + each["telemetry_ms"] / each["step_ms"])


@pytest.mark.long
def test_formats() -> None:
    details = run("formats")["details"]
    for taken in details["milliseconds"].values():
        assert taken.keys() == {"dense", "CSR", "HAM", "sHAM", "HAM, numpy", "sHAM, numpy"}
        assert all(milliseconds > 0 for milliseconds in taken.values())
    held = details["bytes"]
    assert held["sHAM"] < held["HAM"] < held["CSR"] < held["dense"] == 4 * details["size"] ** 2


@pytest.mark.long
def test_runtime() -> None:
    result = run("runtime", "--runs", "none")
    rows = result["details"]["rows"]
    assert [row["spread"] for row in rows] == ["uniform", "erk", "erk", "erk"]
    assert [row["threads"] for row in rows] == [1, 1, 1, 2]
    for row in rows:
        assert {"native", "torch", "onnxruntime"} <= row["milliseconds"].keys()
    for row in rows[:2]:
        # In the random networks all norms are at their defaults, which compact keeps and which
        # are folded here.
        assert row["bytes"] < row["compact"]
    for row in rows[2:]:
        peaks = {engine: m["peak"] - m["before"] for engine, m in row["memory"].items()}
        assert 0 < peaks["native"] < peaks["onnxruntime"]
    for of in (runtime_tables.densities, runtime_tables.batches):
        _assert_a_table(of(result))


@pytest.mark.long
def test_runtime_layers() -> None:
    details = run("runtime_layers")["details"]
    for layer in details["layers"].values():
        assert layer["ratios"].keys() == {"1.0", "0.5", "0.4", "0.3", "0.2", "0.1", "0.05", "0.02"}
        assert layer["nanoseconds"] > 0 and 0 <= layer["even"] <= 1
    _assert_a_table(runtime_tables.layers({"details": details}))


def _assert_a_table(rows: list[list[str]]) -> None:
    assert len(rows) > 1 and len({len(row) for row in rows}) == 1, rows


def test_tables_are_written_between_their_marks() -> None:
    """And nowhere else; each has a place in one document at least."""
    texts = [document.read_text() for document in runtime_tables.DOCUMENTS]
    for block in runtime_tables.BLOCKS:
        assert any(runtime_tables.BEGIN.format(block) in text for text in texts)
    for text in texts:
        tables = {block: f"| {block} |" for block in runtime_tables.BLOCKS}
        once = runtime_tables.with_tables(text, tables)
        assert runtime_tables.with_tables(once, tables) == once != text
        outside = [part.partition("<!-- end -->")[2] for part in text.split("<!-- python")[1:]]
        assert all(part in once for part in outside)


def test_two_forms_that_train_differently_are_refused() -> None:
    settings = Settings(lr=0.05, lam=0.3, mask_lr=0.02)
    check_same_training(settings, settings)
    with pytest.raises(RuntimeError, match="do not train the same network"):
        check_same_training(settings, replace(settings, lam=0.31))
    with pytest.raises(RuntimeError, match="nothing to compare"):
        check_same_training(replace(settings, mask_lr=1e-6), settings)


def test_the_rounds_of_calls_in_turn() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    rounds = in_turn(calls, torch.device("cpu"), 2, before=lambda: order.append("before"))
    assert order == ["before", "a", "before", "b", "before", "b", "before", "a"]
    assert [r.keys() for r in rounds] == [{"a", "b"}] * 2
    known = [{"a": 2.0, "b": 1.0}, {"a": 8.0, "b": 2.0}, {"a": 9.0, "b": 3.0}]
    assert median(known, "a") == 8.0
    assert median_ratio(known, "a", "b") == 3.0


def test_the_model_of_an_all_reduce() -> None:
    network = Network(gpus_per_node=8, intra=400.0, inter=50.0, latency=0.25)
    assert network.all_reduce(800.0, 1) == 0
    # Up and down a tree of 8: 6 hops. A ring would take 14 / 8 · 2 + 14 · 0.25 = 7.
    inside = 2 * 800 / 400 + 6 * 0.25
    assert network.all_reduce(800.0, 8) == pytest.approx(inside)
    # Between 4 nodes, each GPU goes round a ring with its eighth. A tree would take 5.
    between = 6 / 4 * 100 / 50 + 6 * 0.25
    assert network.all_reduce(800.0, 32) == pytest.approx(inside + between)


def test_the_model_of_a_step() -> None:
    network = Network(gpus_per_node=8, intra=1e9, inter=1e9, latency=1e-3)
    model = Model(network, {"dense": 1.0, "scl": 1.1}, parameters=1000, layers=3)
    assert model.step("dense", 1) == 1.0
    assert model.efficiency("scl", 1) == 1.0
    own, counts = 4 * (1 + 9 + 1), 8 * 3
    assert (message_bytes(layers=3, ranks=2), count_bytes(layers=3)) == (own, counts)
    more = sum(network.all_reduce(size, 2) for size in (4 * 1000, own, counts))
    assert model.step("scl", 2) == pytest.approx(1.1 + more)


def test_the_hours_of_a_run_are_what_they_are_made_of() -> None:
    """Against sums by hand; each term appears where its cause does."""
    ideal = Machine(3000.0, 8, 1e15, 1e15, 1e15, 300, 180, 1e-9, 0.0)
    alone = run_of(ideal, 1, 90)
    # Nothing but updates: 90 epochs of 1,281,167 images at 3,000 a second, SCL at 1.02 of dense.
    assert alone.total == pytest.approx(90 * 1_281_167 / 3000 * 1.02 / 3600, rel=1e-6)
    assert run_of(ideal, 1024, 90).communication > 0
    # A file system of 40 GB/s, and nothing cached: 110 KB an image, and no faster.
    slow = replace(ideal, shared_read=40e9)
    bound = run_of(slow, 1024, 90)
    assert bound.total == pytest.approx(90 * 1_281_167 * 110_000 / 40e9 / 3600, rel=1e-6)
    assert run_of(replace(slow, cached=1.0), 1024, 90).reading == 0
    # 128 nodes that fail every 6,300 hours each: one failure in 49 hours, each of 8 minutes and
    # half of the time between two saves.
    failing = run_of(replace(ideal, mtbf_node_h=6300, copy_s=0.5), 1024, 9000)
    count = failing.total / (6300 / 128)
    each = (480 + 60 * failing.every_minutes / 2) / 3600
    assert failing.failures == pytest.approx(count * each, rel=1e-3)
    assert failing.every_minutes == pytest.approx((2 * 0.5 * 3600 * 6300 / 128) ** 0.5 / 60)


@pytest.mark.long
def test_the_gpu_day_is_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    """Every part runs, within the time; what one lacks or has no time for is said of it alone."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--minutes", "2"]
    began = time.monotonic()
    code, output = finish(launch([*command, "--out", str(tmp_path)]), timeout=400)
    took = time.monotonic() - began
    assert code == 0, output
    result = json.loads((tmp_path / "results.json").read_text())
    assert json.loads(output.splitlines()[-1]) == result
    # Starting comes on top, however busy the machine is.
    assert result["seconds"] < min(took, 2 * 60 + 10)
    parts = {part["name"]: part for part in result["parts"]}
    assert [part.name for part in PARTS] == list(parts)
    # A busy machine may not come further; an idle one is through in half of the time.
    states = {part["state"] for part in parts.values()}
    assert states <= {"done", "out of time", "no time left"}
    assert parts["kernels"]["state"] == "done"
    worst = parts["kernels"]["rows"][-1]
    assert worst["what"].startswith("worst ratio") and worst["value"] < 4
    assert all(name in (tmp_path / "table.txt").read_text() for name in parts)


def test_a_part_that_fails_or_hangs_ends_alone(tmp_path: Path) -> None:
    def fails() -> None:
        print("on the way", flush=True)
        raise ValueError("it cannot")

    def hangs() -> None:
        subprocess.Popen(["sleep", "1000"])
        time.sleep(1000)

    assert forked(fails, tmp_path / "log", 60) == 1
    log = (tmp_path / "log").read_text().splitlines()
    assert log[0] == "on the way" and log[-1] == "ValueError: it cannot"
    before = set(psutil.pids())
    assert forked(hangs, tmp_path / "log", 1) is None
    left = [p for p in set(psutil.pids()) - before if "sleep 1000" in _command(p)]
    assert not left


def _command(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""
