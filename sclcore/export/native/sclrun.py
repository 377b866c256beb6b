"""Runs a network that `scl export --format native` wrote: needs numpy and a C compiler.

import sclrun

logits = sclrun.load("folder")(images)  # float32 [batch, channels, height, width]
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

_FLOATS = ctypes.POINTER(ctypes.c_float)


class Model:
    """The network of a folder, as a function of images. Any number of threads may call it."""

    def __init__(self, library: ctypes.CDLL, path: Path, threads: int) -> None:
        self._library, self.threads = library, threads
        reason = ctypes.create_string_buffer(400)
        self._model = ctypes.c_void_p(
            library.scl_load(os.fsencode(path), reason, ctypes.c_size_t(len(reason)))
        )
        if not self._model:
            raise ValueError(f"{path}: {reason.value.decode()}")
        self.input_shape = self._shape(library.scl_input_shape)
        shape = self._shape(library.scl_output_shape)
        self.output_shape = shape[:1] if shape[1:] == (1, 1) else shape
        self.kernels = library.scl_kernels(self._model).decode()

    def __call__(self, images: ArrayLike, threads: int | None = None) -> NDArray[np.float32]:
        """Outputs float32 [batch, …] of `images` [batch, …]; raises ValueError for other shapes."""
        images = np.ascontiguousarray(images, np.float32)
        if images.shape[1:] != self.input_shape and images.shape[1:] != self.input_shape[:1]:
            wanted = "×".join(map(str, self.input_shape))
            raise ValueError(f"images are {images.shape}; this network takes batches of {wanted}")
        if int(np.prod(images.shape[1:])) != int(np.prod(self.input_shape)):
            raise ValueError(f"images are {images.shape}; height and width are missing")
        outputs = np.empty((len(images), *self.output_shape), np.float32)
        failed = self._library.scl_run(
            self._model,
            images.ctypes.data_as(_FLOATS),
            ctypes.c_size_t(len(images)),
            outputs.ctypes.data_as(_FLOATS),
            threads or self.threads,
        )
        if failed:
            raise MemoryError("there is not enough memory for the network's maps")
        return outputs

    def profile(self, images: ArrayLike) -> list[tuple[str, float]]:
        """(description, microseconds) of each step, of one pass on one thread."""
        images = np.ascontiguousarray(images, np.float32)
        lines = self._library.scl_describe(self._model).decode().splitlines()
        outputs = np.empty((len(images), *self.output_shape), np.float32)
        times = (ctypes.c_double * len(lines))()
        self._library.scl_profile(
            self._model,
            images.ctypes.data_as(_FLOATS),
            ctypes.c_size_t(len(images)),
            outputs.ctypes.data_as(_FLOATS),
            times,
            len(lines),
        )
        return [(line, time / 1000) for line, time in zip(lines, times, strict=True)]

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self._library.scl_free(self._model)

    def _shape(self, function: ctypes._NamedFuncPointer) -> tuple[int, ...]:
        shape = (ctypes.c_int * 3)()
        function(self._model, shape)
        return tuple(shape)


def load(
    folder: str | os.PathLike[str],
    threads: int = 1,
    library: str | os.PathLike[str] | None = None,
) -> Model:
    """The network in `folder`, or of a file; libscl.so is compiled there if it is missing.

    `threads` is how many one call computes with. Raises ValueError for a damaged file, OSError
    where the library cannot be made or loaded.
    """
    path = Path(folder).resolve()
    file = path / "model.scln" if path.is_dir() else path
    made = Path(library) if library is not None else file.with_name("libscl.so")
    if not made.exists():
        done = subprocess.run(["make", "-C", str(made.parent)], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{made} cannot be compiled: {done.stderr.strip()[:400]}")
    return Model(_declared(ctypes.CDLL(str(made))), file, threads)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.scl_load.restype = ctypes.c_void_p
    library.scl_kernels.restype = library.scl_describe.restype = ctypes.c_char_p
    return library
