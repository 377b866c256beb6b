"""The program that sanitizers watch, for every test here that asks for it."""

from tests.sclcore.export.native.native import watched

__all__ = ["watched"]
