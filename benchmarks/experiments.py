"""`python benchmarks/experiments.py`, deprecated; moved to `studies/experiments.py`."""

from moved import run_as_module

run_as_module("studies.experiments")
