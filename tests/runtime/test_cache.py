"""Compiled programs are kept between processes, in the user's cache directory, and limited."""

import stat
import subprocess
import sys
from pathlib import Path

from helpers import ROOT, user_environment

PROGRAM = """
import sys, jax, jax.monitoring
from shared_basis.runtime.distributed import keep_compiled_programs
events = []
jax.monitoring.register_event_listener(lambda event, **kwargs: events.append(event))
keep_compiled_programs()
print(jax.jit(lambda x: x + 1)(1), jax.config.jax_compilation_cache_max_size,
      sum(event.endswith("cache_hits") for event in events) > 0)
"""


def run(home: Path, **variables: str) -> list[str]:
    """Returns the words that a process prints which compiles a program: its result, the limit, whether it was kept."""
    environment = {name: value for name, value in user_environment().items()
                   if name not in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")}
    done = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT,
                          env={**environment, "HOME": str(home), **variables})
    assert done.stderr == ""
    return done.stdout.split()


def test_a_second_process_finds_what_the_first_has_compiled(tmp_path):
    assert run(tmp_path) == ["2", str(2**30), "False"]
    (directory,) = (tmp_path / ".cache" / "shared_basis").iterdir()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700  # what is kept is run
    assert run(tmp_path) == ["2", str(2**30), "True"]


def test_the_cache_lies_where_the_user_wants_it(tmp_path):
    run(tmp_path, XDG_CACHE_HOME=str(tmp_path / "elsewhere"))
    assert list((tmp_path / "elsewhere" / "shared_basis").glob("*/*"))
    run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "jax"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert list((tmp_path / "jax").iterdir())
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR="")[0] == "2"
    assert not (tmp_path / ".cache").exists()


def test_nothing_is_kept_where_nothing_can_be_written(tmp_path):
    (tmp_path / ".cache").write_text("a file in the way")
    assert run(tmp_path) == ["2", "-1", "False"]
