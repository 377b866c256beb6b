"""Sparse networks as C: a runtime that stores and multiplies live weights alone."""

from sclcore.export.native.save import save_native

__all__ = ["save_native"]
