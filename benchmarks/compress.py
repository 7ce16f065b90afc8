"""`python benchmarks/compress.py`, as an earlier version had it; its code is `studies/compress.py`."""

from moved import run_as_module

run_as_module("studies.compress")
