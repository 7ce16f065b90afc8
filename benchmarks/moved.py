"""Scripts of an earlier version, `python benchmarks/NAME.py`: each goes on for one version as a module, with a note.

Whatever imports this is run as a script, whose own directory is where Python looks for modules first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn


def run_as_module(name: str) -> NoReturn:
    """Goes on as `python -m NAME` with the same arguments, from whichever directory."""
    old = f"benchmarks/{Path(sys.argv[0]).name}"
    print(f"note: python {old} is now python -m {name}", file=sys.stderr, flush=True)
    root = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    os.execv(sys.executable, [sys.executable, "-m", name, *sys.argv[1:]])
