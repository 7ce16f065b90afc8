"""Runs `python -m studies.published` from the repository's root, with a deprecation note."""

import runpy
import sys

print("note: python -m shared_basis.published is now python -m studies.published", file=sys.stderr)
runpy.run_module("studies.published", run_name="__main__")
