"""The settings of a step are declared once more in C and in Triton: here they are compared."""

from __future__ import annotations

import ctypes
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from sclcore.kernels import cpu
from sclcore.kernels.options import RATES
from sclcore.kernels.proxies import PROXIES

SOURCE = Path(cpu.__file__).with_name("cpu.c").read_text()
TYPES = {"float": ctypes.c_float, "int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64}


def fields_of(name: str) -> list[tuple[str, Any]]:
    """(name, ctypes' type) of each field of a struct in the C source; pointers are addresses."""
    body = re.findall(r"typedef struct \{([^}]*)\} (\w+);", SOURCE)
    [text] = [inside for inside, called in body if called == name]
    found: list[tuple[str, Any]] = []
    for line in re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL).split(";"):
        if line.strip():
            kind, names = re.fullmatch(r"(?:const )?(\w+) (.*)", line.strip()).groups()  # type: ignore[union-attr]
            for field in names.split(","):
                pointer = "*" in field
                found.append((field.strip(" *"), ctypes.c_void_p if pointer else TYPES[kind]))
    return found


@pytest.mark.parametrize(("name", "ours"), [("Piece", cpu._Piece), ("Settings", cpu._Settings)])
def test_ctypes_sees_what_c_declares(name: str, ours: Any) -> None:
    assert [*ours._fields_] == fields_of(name)


def test_c_knows_the_proxies_by_the_same_numbers() -> None:
    [names] = re.findall(r"enum \{ (IDENTITY[^}]*) \}", SOURCE)
    assert tuple(name.strip().lower() for name in names.split(",")) == cpu._PROXIES
    assert set(cpu._PROXIES) == set(PROXIES)


def test_triton_takes_the_rates_in_the_same_order() -> None:
    triton_kernels = pytest.importorskip("sclcore.kernels.triton_kernels")
    for kernel in (triton_kernels.update, triton_kernels._move):
        names = [*inspect.signature(kernel.fn).parameters]
        assert [name for name in names if name in RATES] == [*RATES]
