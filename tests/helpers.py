"""Small networks, states and references shared by several test files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, Mesh
from PIL import Image

from shared_basis import data
from shared_basis.config import Config, DataConfig, ModelConfig
from shared_basis.errors import UserError
from shared_basis.models.base import Sharing
from shared_basis.models.parameters import abstract_variables
from shared_basis.models.registry import FAMILIES, Family, register
from shared_basis.models.resnet import ResNet
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runs.trained import build_model
from shared_basis.runs.workdir import FILES, Workdir, make_record
from shared_basis.runtime.reporter import Reporter

ROOT = Path(__file__).resolve().parents[1]
MAIN = ROOT / "main.py"


def assert_refused_in_one_line(main: Callable[[Sequence[str]], object], arguments: Sequence[str], parts: Sequence[str],
                               capsys: pytest.CaptureFixture[str]) -> None:
    """Asserts that `main` exits with code 2 and prints only one line, with all `parts`, to standard error."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert all(part in err for part in parts)


def tiny_network(num_classes: int = 10, **changes: Any) -> ResNet:
    """Returns a network with all relevant features (batch norm, shared bases, unique elements), quick to compile."""
    double = Sharing((("first", "first"), ("second", "second")), shared_rank=2, unique_rank=1)
    return ResNet(**{"blocks": (2,), "widths": (4,), "num_classes": num_classes, "sharing": double, "project": False,
                     **changes})


def register_tiny() -> str:
    """Registers `tiny_network` and returns its name for configurations: `tiny-s2u1-double` and others."""
    if "tiny" not in FAMILIES:
        register("tiny", Family(ResNet, ("cifar",), FAMILIES["resnet20"].forms,
                                {"blocks": (2,), "widths": (4,), "project": False}))
    return "tiny-s2u1-double"


TINY = register_tiny()
"""The network that most training tests use, so that they share one compiled program."""


@contextlib.contextmanager
def small_networks(*modules: ModuleType, **changes: Any) -> Iterator[None]:
    """Makes `modules` build a network that compiles fast for any name, for code that does not depend on the network."""
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "build_model", lambda config, spec: tiny_network(len(spec.classes), **changes))
        yield


class Linear(nn.Module):
    """A linear classifier that stores its last training images in `batch_stats`, for tests to inspect."""

    num_classes: int = 10
    batch: int = 1

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        seen = self.variable("batch_stats", "seen", jnp.zeros, (self.batch, *images.shape[1:]))
        if train:
            seen.value = images
        return nn.Dense(self.num_classes, name="head")(images.reshape(len(images), -1))


def make_images(count: int, size: int = 8, channels: int = 1, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Returns random images uint8 [count, size, size, channels] and labels."""
    rng = np.random.default_rng(0)
    return (rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8),
            rng.integers(0, classes, count).astype(np.int32))


def mesh_of(devices: int) -> Mesh:
    """Returns the mesh of `make_mesh` for the given number of devices."""
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def cross_entropies(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns −log softmax at the labels, in float64."""
    logits = np.asarray(logits, np.float64)
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(labels)), labels]


def assert_trees_equal(actual: Any, desired: Any) -> None:
    """Asserts that two trees have the same structure and leaves that are equal bit for bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for path, (one, other) in zip(jax.tree_util.tree_flatten_with_path(actual)[0],
                                  zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=jax.tree_util.keystr(path[0]))
        assert np.asarray(one).dtype == np.asarray(other).dtype


def refusal(call: Callable[..., Any], *arguments: Any) -> str:
    """Returns the message of the `UserError` that the call raises; empty if it raises none."""
    try:
        call(*arguments)
    except UserError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def user_error(*parts: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expects a one-line `UserError` that contains all `parts`."""
    with pytest.raises(UserError) as caught:
        yield caught
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def write_folder(root: Path, classes: Sequence[str], count: int, size: int = 8) -> Path:
    """Writes `count` random images of `size` × `size` pixels for each class and split, and returns `root`."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def save_run(path: Path, config: Config, accuracies: Mapping[int, float]) -> Path:
    """Creates a workdir as training does, with a random network at each step, and returns `path`."""
    spec = data.describe(config.data)
    record = make_record(config, {"classes": list(spec.classes), "image_shape": list(spec.image_shape),
                                  "train_examples": 1, "test_examples": 1})
    if config.data.name == "folder":
        record["data"][FILES] = data.fingerprint(data.open_source(config.data).splits)
    run = Workdir(path)
    run.claim(record)
    checkpoints = Checkpoints(run.checkpoints)
    for step, accuracy in accuracies.items():
        rng = np.random.default_rng(step)
        variables = jax.tree.map(lambda leaf, rng=rng: jnp.asarray(rng.uniform(0.1, 0.5, leaf.shape), leaf.dtype),
                                 dict(abstract_variables(build_model(config, spec), spec.image_shape)))
        checkpoints.save(step, {**variables, "step": jnp.asarray(step)}, record, {"test_accuracy": accuracy})
    checkpoints.close()
    return path


def save_run_without_test_images(root: Path) -> Path:
    """Creates a workdir below `root` and a folder of images, none of whose test images can be decoded."""
    images = write_folder(root / "images", ("cat", "dog"), 2)
    config = Config(model=ModelConfig(name=TINY), data=DataConfig(
        name="folder", directory=str(images), on_broken="skip", workers=0, placement="stream"))
    run = save_run(root / "run", config, {6: 0.25})
    for path in images.glob("test/*/*"):
        path.write_bytes(b"no image")
    return run


class Watcher(Reporter):
    """Records progress, and sends a signal to this process when one of the training steps `at` is shown."""

    def __init__(self, at: Sequence[int] = (), signum: int = signal.SIGTERM) -> None:
        self.text = io.StringIO()
        super().__init__(self.text)
        self._at, self._signum = at, signum
        self.steps: list[int] = []
        self.totals: set[int] = set()

    def show_progress(self, done: int, total: int, text: str) -> None:
        if not text.startswith("epoch ") or text.endswith(" scored"):  # of other things than steps
            return
        self.steps.append(done)
        self.totals.add(total)
        if done in self._at:
            signal.raise_signal(self._signum)


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl without timings."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop("images_per_second") >= 0 for line in lines)
    return lines


def read_arrays(workdir: Path, step: int) -> Any:
    """Returns all arrays of a checkpoint, read by plain Orbax."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(workdir / "checkpoints" / str(step) / "state")


def user_environment() -> dict[str, str]:
    """Returns the environment of a user's shell: no virtual devices, but the compilation cache of the tests."""
    return {**{name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")},
            "COLUMNS": "100", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


_SERVER = """
import json, os, runpy, sys
sys.path.insert(0, sys.argv[1])
import sklearn.datasets, shared_basis.evaluation.evaluate, shared_basis.models.summary, shared_basis.training.train
while line := sys.stdin.readline():
    request = json.loads(line)
    child = os.fork()
    if not child:
        for number, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(request["cwd"])
        sys.argv = request["argv"]
        sys.orig_argv = [sys.executable, *sys.argv]  # the process is its own, as one that a shell starts
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class CommandLine:
    """Runs `main.py` as `python main.py ...` does, repeatedly, but imports packages, which takes seconds, only once.

    Each command runs in a separate process, forked from one that has only imported the packages. Training writes no
    report, which takes seconds, unless --report is given.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._server = subprocess.Popen([sys.executable, "-c", _SERVER, str(ROOT)], text=True, env=user_environment(),
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Returns the exit code and the output."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        paths = {name: self._scratch / name for name in ("stdout", "stderr")}
        request = {"argv": [str(MAIN), "--noreport", *arguments], "cwd": str(cwd),
                   **{k: str(path) for k, path in paths.items()}}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, *(path.read_text() for path in paths.values()))

    def close(self) -> None:
        """Ends the process from which the others are forked."""
        self._server.communicate()


def read_arrays_anywhere(workdir: Path, step: int) -> Any:
    """Returns the result of `read_arrays`, even if the devices of the checkpoint are not available."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        return checkpointer.restore(workdir / "checkpoints" / str(step) / "state",
                                    args=ocp.args.StandardRestore(fallback_sharding=here))
