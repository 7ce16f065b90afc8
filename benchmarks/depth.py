"""`python benchmarks/depth.py`, as an earlier version had it; its code is `studies/depth.py`."""

from moved import run_as_module

run_as_module("studies.depth")
