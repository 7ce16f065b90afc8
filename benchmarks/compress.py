"""`python benchmarks/compress.py`, deprecated; moved to `studies/compress.py`."""

from moved import run_as_module

run_as_module("studies.compress")
