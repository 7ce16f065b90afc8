"""Set-up that must precede the first import of JAX, and the fixtures that all tests share.

Four virtual CPU devices stand in for a data-parallel machine. Compiled programs are kept below `.pytest_cache`, so that
a second run of the tests spends its time on testing.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from gcs_emulator import Emulator
    from helpers import CommandLine
    from hostile import Reader

ROOT = Path(__file__).resolve().parents[1]
BEGAN = time.monotonic()

# The older emitters compile in half of the time; from 0.12 on there are none, and XLA refuses the flag. Slow tests have
# those of users: with the older ones what two programs both compute may differ in the last bit.
QUICK = "--xla_cpu_use_fusion_emitters=false " if version("jaxlib").startswith(("0.10.", "0.11.")) else ""
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it
    os.environ["XLA_FLAGS"] = (f"{os.environ.get('XLA_FLAGS', '')} {'' if 'slow' in sys.argv else QUICK}"
                               "--xla_force_host_platform_device_count=4").strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Compiling takes most of the tests' time, and what they check is small.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Programs in flight at once can deadlock in their collectives where virtual devices outnumber the cores.
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false")


@pytest.fixture(scope="session")
def reference() -> Path:
    """The directory of official networks and what they compute, which lies beside the repository and not in it."""
    path = Path(os.environ.get("SHARED_BASIS_REFERENCE", ROOT.parent / "shared" / "reference"))
    if not path.is_dir():
        pytest.skip(f"no reference files in {path}; name their directory in SHARED_BASIS_REFERENCE")
    return path


@pytest.fixture(scope="module")
def main(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """Runs `main.py`, as a user does."""
    from helpers import CommandLine  # imports JAX

    command_line = CommandLine(tmp_path_factory.mktemp("output"))
    yield command_line
    command_line.close()


@pytest.fixture(scope="module")
def cloud() -> Iterator[Emulator]:
    """A Cloud Storage of this process's own, with a bucket called bucket."""
    from gcs_emulator import Emulator, environment_set

    if importlib.util.find_spec("gcsfs") is None:
        pytest.skip("gs:// needs the extra gcs: pip install -e '.[gcs]'")
    with Emulator() as emulator, environment_set(emulator.environment()):  # before gcsfs is imported
        from shared_basis.runtime import cloud_client

        cloud_client.client.cache_clear()  # which knows the address of an emulator before
        yield emulator
        cloud_client.client.cache_clear()


@pytest.fixture
def storage(cloud: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """`cloud`, of which requests are repeated at once, and in which nothing is wrong any more afterwards."""
    from shared_basis.runtime import cloud_client

    monkeypatch.setattr(cloud_client, "DEFAULT_RETRY", cloud_client.DEFAULT_RETRY.with_delay(0.01, 0.05))
    yield cloud
    cloud.heal()


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    """Reads hostile files in processes that may take little memory."""
    from hostile import Reader

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("the memory of a process is limited as Linux does it")
    process = Reader()
    yield process
    process.close()


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Puts the module `trap_module` where Python finds it; yields the file that appears once it is imported."""
    directory, marker = tmp_path / "modules", tmp_path / "sprung"
    directory.mkdir()
    (directory / "trap_module.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(directory))
    yield marker
    sys.modules.pop("trap_module", None)


@pytest.fixture
def optimized() -> Iterator[None]:
    """Compiles as for users, for tests of compiled programs and of their memory."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --seconds, with which `.ci/run` runs of the slow tests what fits into its time."""
    parser.addoption("--seconds", type=float, help="skip the tests that would begin after so many seconds")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what would begin too late."""
    limit = item.config.getoption("--seconds")
    if limit is not None and time.monotonic() - BEGAN > limit:
        pytest.skip(f"the {limit:g} seconds of --seconds are over")


def pytest_configure(config: pytest.Config) -> None:
    """Lets a cache entry that another process is still writing, or was killed while writing, cost time alone."""
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache")
    # ml_collections loads recipes in a way that Python is to drop.
    config.addinivalue_line("filterwarnings", r"ignore:the load_module\(\) method is deprecated:DeprecationWarning")
