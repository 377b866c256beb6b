"""Engines as functions of numpy arrays, each with its own package and nothing of ours.

So a process that is to show what memory an engine takes imports nothing else (memory.py).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

Array = Any
Session = Callable[[Array], Array]
Opener = Callable[[Path, int], Callable[[], Session]]
"""(file, threads) → what loads it, all imports done."""


def onnxruntime(file: Path, threads: int) -> Callable[[], Session]:
    """With its defaults: all optimisations of the graph, and threads that spin during a run."""
    import onnxruntime as ort

    def load() -> Session:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # After a run they would slow whatever is timed next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda batch: session.run(None, {name: batch})[0]

    return load


def openvino(file: Path, threads: int) -> Callable[[], Session]:
    """In float32, for the least latency."""
    package: Any = importlib.import_module("openvino")
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    # Its default may be bfloat16, in which outputs differ.
    settings["INFERENCE_PRECISION_HINT"] = "f32"

    def load() -> Session:
        compiled = package.Core().compile_model(str(file), "CPU", settings)
        return lambda batch: compiled(batch)[0].copy()

    return load


def native(file: Path, threads: int) -> Callable[[], Session]:
    """By the wrapper that lies beside the file: numpy and libscl.so."""
    spec = importlib.util.spec_from_file_location("sclrun", file.with_name("sclrun.py"))
    assert spec is not None and spec.loader is not None
    sclrun: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sclrun)
    return lambda: sclrun.load(file, threads)


ENGINES: dict[str, Opener] = {
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "native": native,
}
