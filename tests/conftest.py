"""Set-up that must precede the first import of JAX, and the fixtures shared by all tests.

Four virtual CPU devices simulate a data-parallel machine. Compiled programs are cached in `.pytest_cache` for later
runs.
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

# The older emitters compile in half the time; from 0.12 on they are removed, and XLA rejects the flag. Slow tests use
# the users' emitters: with the older ones, results of two programs may differ in the last bit.
QUICK = "--xla_cpu_use_fusion_emitters=false " if version("jaxlib").startswith(("0.10.", "0.11.")) else ""
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit the variable
    os.environ["XLA_FLAGS"] = (f"{os.environ.get('XLA_FLAGS', '')} {'' if 'slow' in sys.argv else QUICK}"
                               "--xla_force_host_platform_device_count=4").strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Compiling takes most of the tests' time, and the checked computations are small.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Concurrent programs can deadlock in their collectives if there are more virtual devices than cores.
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false")


@pytest.fixture(scope="session")
def reference() -> Path:
    """The directory of official networks and their outputs, next to the repository."""
    path = Path(os.environ.get("SHARED_BASIS_REFERENCE", ROOT.parent / "shared" / "reference"))
    if not path.is_dir():
        pytest.skip(f"no reference files in {path}; set SHARED_BASIS_REFERENCE to their directory")
    return path


@pytest.fixture(scope="module")
def main(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """Runs `main.py` as a user does."""
    from helpers import CommandLine  # imports JAX

    command_line = CommandLine(tmp_path_factory.mktemp("output"))
    yield command_line
    command_line.close()


@pytest.fixture(scope="module")
def cloud() -> Iterator[Emulator]:
    """A Cloud Storage emulator in this process, with a bucket named bucket."""
    from gcs_emulator import Emulator, environment_set

    if importlib.util.find_spec("gcsfs") is None:
        pytest.skip("gs:// needs the extra gcs: pip install -e '.[gcs]'")
    with Emulator() as emulator, environment_set(emulator.environment()):  # before gcsfs is imported
        from shared_basis.runtime import cloud_client

        cloud_client.client.cache_clear()  # which has the address of an earlier emulator
        yield emulator
        cloud_client.client.cache_clear()


@pytest.fixture
def storage(cloud: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """`cloud` with immediate retries, and without any faults left afterwards."""
    from shared_basis.runtime import cloud_client

    monkeypatch.setattr(cloud_client, "DEFAULT_RETRY", cloud_client.DEFAULT_RETRY.with_delay(0.01, 0.05))
    yield cloud
    cloud.heal()


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    """Reads hostile files in processes with limited memory."""
    from hostile import Reader

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("limiting the memory of a process requires Linux")
    process = Reader()
    yield process
    process.close()


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Puts the module `trap_module` on Python's path; yields the file that is created when it is imported."""
    directory, marker = tmp_path / "modules", tmp_path / "sprung"
    directory.mkdir()
    (directory / "trap_module.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(directory))
    yield marker
    sys.modules.pop("trap_module", None)


@pytest.fixture
def optimized() -> Iterator[None]:
    """Compiles with the users' options, for tests of compiled programs and their memory."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --seconds, by which `.ci/run` limits the time for slow tests."""
    parser.addoption("--seconds", type=float, help="skip tests that would begin after this many seconds")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests that would begin too late."""
    limit = item.config.getoption("--seconds")
    if limit is not None and time.monotonic() - BEGAN > limit:
        pytest.skip(f"the {limit:g} seconds of --seconds are over")


def pytest_configure(config: pytest.Config) -> None:
    """Ignores compilation cache entries that another process is still writing, or was killed while writing."""
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache")
    # ml_collections loads recipes with a deprecated function.
    config.addinivalue_line("filterwarnings", r"ignore:the load_module\(\) method is deprecated:DeprecationWarning")
