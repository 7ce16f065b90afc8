"""`python benchmarks/depth.py`, deprecated; moved to `studies/depth.py`."""

from moved import run_as_module

run_as_module("studies.depth")
