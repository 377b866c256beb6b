"""Sparse networks as C: a runtime that stores and multiplies live weights alone."""

from sclcore.export.native.save import MODEL, open_native, save_native

__all__ = ["MODEL", "open_native", "save_native"]
