"""Deprecated scripts, `python benchmarks/NAME.py`: each still runs as a module for one version, with a note.

Modules that import this one run as scripts, so Python searches their own directory for modules first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn


def run_as_module(name: str) -> NoReturn:
    """Runs `python -m NAME` with the same arguments, from any working directory."""
    old = f"benchmarks/{Path(sys.argv[0]).name}"
    print(f"note: python {old} is now python -m {name}", file=sys.stderr, flush=True)
    root = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    os.execv(sys.executable, [sys.executable, "-m", name, *sys.argv[1:]])
