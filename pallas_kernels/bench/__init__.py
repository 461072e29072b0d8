"""Checks and times the implementations of every op; see `python -m pallas_kernels.bench --help`."""
