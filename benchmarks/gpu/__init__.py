"""A GPU day in one command: see `python -m benchmarks.gpu --help`."""
