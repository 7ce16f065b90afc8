"""Commands of an earlier version go on, with a note, from whichever directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, user_environment


@pytest.mark.parametrize(("script", "module"), [
    ("data", "benchmarks.data"),
    *(pytest.param(name, f"{room}.{name}", marks=pytest.mark.slow) for name, room in (
        ("speed", "benchmarks"), ("export", "benchmarks"), ("experiments", "studies"), ("depth", "studies"),
        ("compress", "studies")))])
def test_a_script_goes_on_as_a_module(script: str, module: str, tmp_path: Path) -> None:
    done = run(str(ROOT / "benchmarks" / f"{script}.py"), "--none-such", cwd=tmp_path)
    note, *_, error = done.stderr.splitlines()
    assert note == f"note: python benchmarks/{script}.py is now python -m {module}"
    assert error == "error: unrecognized arguments: --none-such"
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.slow
def test_the_table_of_published_figures_goes_on_too() -> None:
    done = run("-m", "shared_basis.published", cwd=ROOT)
    assert done.stderr == "note: python -m shared_basis.published is now python -m studies.published\n"
    assert "| CIFAR-10 | `resnet56-s16u1-double` | 319,226 |" in done.stdout


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python as a user does."""
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=user_environment(), capture_output=True, text=True,
                          timeout=600, check=False)
