"""What every data worker needs, imported once by the server that forks them all."""

from __future__ import annotations

import importlib

from PIL import Image

importlib.import_module(f"{__package__}.pipeline")
# numpy imports it when it is first asked for; torch seeds it in each worker.
importlib.import_module("numpy.random")
# Pillow imports what reads a format when it first meets one, each worker for itself.
Image.init()
