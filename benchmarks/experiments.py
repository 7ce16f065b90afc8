"""`python benchmarks/experiments.py`, as an earlier version had it; its code is `studies/experiments.py`."""

from moved import run_as_module

run_as_module("studies.experiments")
