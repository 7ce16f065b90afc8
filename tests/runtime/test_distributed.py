"""Devices and processes: their number does not change training; how processes start; a batch in parts."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    MAIN,
    ROOT,
    TINY,
    Watcher,
    assert_trees_equal,
    mesh_of,
    read_arrays_anywhere,
    read_metrics,
    user_environment,
    user_error,
)
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import multihost_utils

from shared_basis.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    OrthogonalityConfig,
    TrainConfig,
    replace,
)
from shared_basis.data.batches import EvalBatches, Shard, TrainingBatches
from shared_basis.data.examples import Spec
from shared_basis.data.feeds import scored_at_once
from shared_basis.errors import UserError
from shared_basis.evaluation import evaluate
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runtime.distributed import (
    batch_sharding,
    check_batch_size,
    jax_runtime,
    join,
    make_global_array,
    make_mesh,
    raise_on_all_processes,
    replicated,
)
from shared_basis.runtime.preemption import Interrupted
from shared_basis.training import train

# A run on other devices

CONFIG = Config(
    model=ModelConfig(name=TINY), data=DataConfig(train_examples=68, test_examples=30, pad=1, flip=True, workers=0),
    orthogonality=OrthogonalityConfig(elements="shared+unique"),
    optimizer=OptimizerConfig(learning_rate=0.02, schedule="cosine"),
    train=TrainConfig(epochs=2, batch_size=16, evaluate_every=1))
"""68 images are four steps an epoch, with four left over; evaluation at steps 4 and 8."""


@contextlib.contextmanager
def on_devices(count: int) -> Iterator[None]:
    """Has the machine so many devices within this context."""
    devices = jax.devices()[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices)
        yield


def trained(workdir: Path, count: int, fields: Mapping[str, Any] | None = None, stop: int | None = None) -> Watcher:
    """Trains a network with batch normalisation on so many devices to the end, or until it is stopped at a step."""
    reporter = Watcher(at=[] if stop is None else [stop - 1])
    with on_devices(count), (
            contextlib.nullcontext() if stop is None else pytest.raises(Interrupted, match=f"at step {stop} ")):
        train.train(replace(CONFIG, fields or {}), workdir, reporter)
    return reporter


def assert_close(actual: Any, desired: Any) -> None:
    """Asserts that two trees are equal but for rounding."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=5e-5), actual, desired)


def assert_runs_close(workdir: Path, other: Path) -> None:
    """Asserts that two runs have computed the same but for rounding: every metric and every array."""
    metrics, others = read_metrics(workdir), read_metrics(other)
    assert [line["step"] for line in metrics] == [4, 8]
    assert_close(metrics, others)
    for step in (4, 8):
        assert_close(read_arrays_anywhere(workdir, step), read_arrays_anywhere(other, step))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the workdir of a run on one device; for reading only."""
    workdir = tmp_path_factory.mktemp("runs") / "one"
    trained(workdir, 1)
    return workdir


@pytest.mark.parametrize(("count", "placement"), [
    pytest.param(2, "device", marks=pytest.mark.slow), pytest.param(4, "stream", marks=pytest.mark.slow)])
def test_a_run_is_the_same_on_any_number_of_devices(one: Path, tmp_path: Path, count: int, placement: str) -> None:
    reporter = trained(tmp_path / "run", count, {"data.placement": placement})
    assert f"; {count} × cpu; workdir" in reporter.text.getvalue()
    assert_runs_close(tmp_path / "run", one)


_EIGHT = """
import pathlib, sys
sys.path[:0] = sys.argv[1:3]
import runtime.test_distributed as tests
for placement in ("device", "stream"):
    tests.trained(pathlib.Path(sys.argv[3]) / placement, 8, {"data.placement": placement})
tests.trained(pathlib.Path(sys.argv[3]) / "groups", 8, {"model.norm_images": 2})
"""


@pytest.mark.slow
def test_a_run_is_the_same_on_eight_devices(one: Path, tmp_path: Path) -> None:
    environment = {**user_environment(), "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run([sys.executable, "-c", _EIGHT, str(ROOT / "tests"), str(ROOT), str(tmp_path)], env=environment,
                   timeout=600, check=True)
    assert_runs_close(tmp_path / "device", one)
    assert read_metrics(tmp_path / "device") == read_metrics(tmp_path / "stream")
    for count in (1, 2, 4):
        trained(tmp_path / str(count), count, {"model.norm_images": 2})
        assert_runs_close(tmp_path / str(count), tmp_path / "groups")
    losses = [read_metrics(workdir)[-1]["train_loss"] for workdir in (tmp_path / "groups", one)]
    assert abs(losses[0] - losses[1]) > 1e-3, "batch normalisation saw the whole batch"


@pytest.mark.parametrize(("first", "then"), [
    pytest.param(4, 1, marks=pytest.mark.slow), pytest.param(1, 4, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_devices(one: Path, tmp_path: Path, first: int, then: int) -> None:
    trained(tmp_path / "run", first, stop=3)
    reporter = trained(tmp_path / "run", then)
    assert "resumes at step 3 of 8" in reporter.text.getvalue()
    assert f"; {then} × cpu; workdir" in reporter.text.getvalue()
    assert reporter.steps == [4, 5, 6, 7, 8]
    assert_runs_close(tmp_path / "run", one)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_checkpoint_lies_where_it_is_restored_to(tmp_path: Path, count: int) -> None:
    state = {"weights": np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, jax.device_put(state, replicated(mesh_of(4))), {}, None)
    checkpoints.wait()
    for sharding in (replicated(mesh_of(count)), batch_sharding(mesh_of(count))):
        restored = checkpoints.restore(1, {"weights": jax.ShapeDtypeStruct((8, 3), np.float32, sharding=sharding)})
        assert restored["weights"].sharding == sharding
        assert_trees_equal(restored, state)
    checkpoints.close()


@pytest.mark.slow
def test_a_run_is_scored_the_same_on_other_devices(one: Path) -> None:
    last, scores = read_metrics(one)[-1], evaluate.evaluate(one)
    for name in ("test_loss", "test_accuracy", "test_accuracy_top5"):
        assert scores[name] == pytest.approx(last[name], rel=1e-5)


@pytest.mark.slow
def test_a_run_does_not_go_on_in_double_precision(one: Path, tmp_path: Path) -> None:
    shutil.copytree(one, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    with jax.enable_x64(True), user_error("checkpoint 4 in ", "the dtype of ", " is float32 there and float64 here",
                                          "JAX_ENABLE_X64"):
        trained(tmp_path / "run", 1)
    assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps == [4]


@pytest.mark.parametrize("name", ["params/head/kernel", "batch_stats/head/mean"])
def test_a_checkpoint_of_another_dtype_is_refused_by_name(tmp_path: Path, name: str) -> None:
    arrays = {"params": {"head": {"kernel": jnp.ones((2, 3))}}, "batch_stats": {"head": {"mean": jnp.ones(3)}}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, arrays, {}, None)
    checkpoints.wait()
    target = jax.tree_util.tree_map_with_path(lambda path, leaf: jax.ShapeDtypeStruct(
        leaf.shape, np.float64 if "/".join(key.key for key in path) == name else np.float32,
        sharding=replicated(mesh_of(1))), arrays)
    for restore in (checkpoints.restore, checkpoints.restore_variables):
        with user_error("checkpoint 1 in ", f"the dtype of {name} is float32 there and float64 here"):
            restore(1, target)
    checkpoints.close()


# Where things lie

def test_the_devices_of_a_process_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = {0: 0, 1: 0, 4: 0, 5: 0, 2: 1, 3: 1, 6: 1, 7: 1}  # as TPUs are numbered, by rows of chips
    unsorted = [types.SimpleNamespace(id=index, process_index=owners[index]) for index in (3, 0, 7, 5, 2, 1, 6, 4)]
    monkeypatch.setattr(jax, "devices", lambda: unsorted)
    monkeypatch.setattr("shared_basis.runtime.distributed.Mesh", lambda array, axes, axis_types: array)
    assert [device.id for device in make_mesh()] == list(owners)


def test_the_mesh_is_of_all_devices() -> None:
    assert make_mesh() == mesh_of(4)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("sharding", [replicated(mesh_of(4)), batch_sharding(mesh_of(4))], ids=["whole", "divided"])
def test_what_every_process_has_is_placed_as_jax_places_it(monkeypatch: pytest.MonkeyPatch, processes: int,
                                                           sharding: Any) -> None:
    array = np.arange(24).reshape(8, 3).astype(np.int32)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    placed = make_global_array(array, sharding)
    assert placed.sharding == sharding
    for shard, expected in zip(placed.addressable_shards, jax.device_put(array, sharding).addressable_shards,
                               strict=True):
        assert shard.device == expected.device
        np.testing.assert_array_equal(shard.data, expected.data)


@given(batch_size=st.integers(1, 3000), count=st.integers(1, 40), grad_accumulation_steps=st.integers(1, 9))
def test_a_batch_divides_among_devices_and_parts_or_the_nearest_that_do_are_told(batch_size: int, count: int,
                                                                                 grad_accumulation_steps: int) -> None:
    def fits(size: int) -> bool:
        return size % count == 0 and size // count % grad_accumulation_steps == 0

    mesh: Any = types.SimpleNamespace(size=count)
    if fits(batch_size):
        check_batch_size(batch_size, mesh, grad_accumulation_steps)
        return
    with user_error(f"train.batch_size={batch_size}: ", f"the {count} devices") as caught:
        check_batch_size(batch_size, mesh, grad_accumulation_steps)
    message = str(caught.value)
    assert ("optimizer.grad_accumulation_steps" in message) == (grad_accumulation_steps > 1)
    assert f"optimizer.grad_accumulation_steps={grad_accumulation_steps}" in message or grad_accumulation_steps == 1
    offered = [int(size) for size in re.findall(r"\d+", message.partition("the nearest: ")[2])]
    below = next((size for size in range(batch_size, 0, -1) if fits(size)), None)
    above = next(size for size in itertools.count(batch_size) if fits(size))
    assert offered == ([above] if below is None else [below, above])


def test_the_nearest_sizes_divide_into_groups_of_images_too() -> None:
    mesh: Any = types.SimpleNamespace(size=6)
    with user_error("the nearest: 192 or 384. A run that has begun keeps its size"):
        check_batch_size(256, mesh, norm_images=64)


def test_a_batch_that_cannot_be_divided_ends_training_before_it_begins(tmp_path: Path) -> None:
    with user_error("train.batch_size=12", "4 devices times optimizer.grad_accumulation_steps=2", "8 or 16"):
        trained(tmp_path / "run", 4, {"train.batch_size": 12, "optimizer.grad_accumulation_steps": 2})
    assert list(tmp_path.iterdir()) == []


# A slice of 256 chips on 64 hosts

class Counted:
    """Examples that count how often each was read, by which host."""

    def __init__(self, count: int) -> None:
        self.reads: dict[int, collections.Counter[int]] = collections.defaultdict(collections.Counter)
        self.host, self._count = 0, count

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int]) -> list[tuple[np.ndarray, int]]:
        self.reads[self.host].update(map(int, indices))
        return [(np.full((2, 2, 1), index % 251, np.uint8), index % 10) for index in indices]


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_64_hosts_read_each_image_once_together_and_the_same_number_each(kind: str) -> None:
    examples: Any = Counted(2048 if kind == "train" else 2000)
    spec, config = Spec((2, 2, 1), tuple("abcdefghij")), DataConfig()
    whole = []
    for host in range(64):
        examples.host, shard = host, Shard(host, 64)
        batches = TrainingBatches(examples, spec, config, seed=0, batch_size=1024, epochs=1, shard=shard) \
            if kind == "train" else EvalBatches(examples, spec, config, batch_size=scored_at_once(1000, 2000, 256),
                                                shard=shard)
        whole.append([batches[number] for number in range(len(batches))])
    assert sum(examples.reads.values(), collections.Counter()) == dict.fromkeys(range(len(examples)), 1)
    for number, parts in enumerate(zip(*whole, strict=True)):
        assert {len(part.labels) for part in parts} == {16}, "four chips of a host have four each"
        counted = sum((part.labels >= 0).sum() for part in parts)
        assert counted == (1024 if kind == "train" or not number else 2000 - 1024), "what fills up does not count"
    if kind == "train":
        assert {reads.total() for reads in examples.reads.values()} == {2 * 16}


@pytest.mark.parametrize(("batch_size", "count", "size"), [(1000, 10_000, 1024), (1000, 50_000, 1024), (1000, 100, 256),
                                                           (4096, 50_000, 4096)])
def test_an_evaluation_s_batch_is_filled_for_256_chips(batch_size: int, count: int, size: int) -> None:
    assert scored_at_once(batch_size, count, 256) == size


# What processes settle among themselves

def test_an_error_of_the_only_process_passes_unchanged() -> None:
    for error in (UserError("the user's mistake"), KeyError("ours")):
        with pytest.raises(type(error)) as caught, raise_on_all_processes():
            raise error
        assert caught.value is error
    with raise_on_all_processes():
        pass


def test_a_process_ends_with_its_own_error_or_with_word_of_the_first_that_has_one(
        monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def allgather(value: Any) -> np.ndarray:
        given.append(bool(value))
        return np.array([False, value, True, True])
    monkeypatch.setattr(multihost_utils, "process_allgather", allgather)
    with user_error("process 2 has stopped with an error"), raise_on_all_processes():
        pass
    with user_error("the user's mistake"), raise_on_all_processes():
        raise UserError("the user's mistake")
    assert given == [False, True]


@pytest.fixture
def initialized(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Returns what JAX is asked to join, which it does not do."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **_: calls.append(arguments))
    return calls


@pytest.mark.parametrize(("arguments", "parts"), [
    (("localhost", 2, 0), ("--coordinator=localhost: ", "HOST:PORT")),
    ((":8476", 2, 0), ("--coordinator=:8476: ", "HOST:PORT")),
    (("", 2, 0), ("--coordinator=: ", "HOST:PORT")),
    (("localhost:", 2, 0), ("--coordinator=localhost:: ", "HOST:PORT")),
    (("localhost:http", 2, 0), ("--coordinator=localhost:http: ", "HOST:PORT")),
    (("localhost:-1", 2, 0), ("--coordinator=localhost:-1: ", "HOST:PORT")),
    (("localhost:0", 2, 0), ("--coordinator=localhost:0: ", "HOST:PORT")),
    (("localhost:65536", 2, 0), ("--coordinator=localhost:65536: ", "HOST:PORT")),
    (("localhost:99999", 2, 1), ("--coordinator=localhost:99999: ", "HOST:PORT")),
    (("localhost:²", 2, 1), ("--coordinator=localhost:²: ", "HOST:PORT")),
    (("localhost:8476", 0, 0), ("--processes=0: ", "1 or more")),
    (("localhost:8476", -2, None), ("--processes=-2: ", "1 or more")),
    (("localhost:8476", 2, -1), ("--process=-1: ", "0 to 2 − 1")),
    (("localhost:8476", 2, 2), ("--process=2: ", "0 to 2 − 1")),
    (("localhost:8476", None, 1), ("--process=1: ", "0 to --processes − 1"))], ids=str)
def test_a_mistake_about_processes_is_told_with_its_flag(initialized: list[Any], arguments: tuple[Any, ...],
                                                         parts: tuple[str, ...]) -> None:
    with user_error(*parts):
        join(*arguments)
    assert initialized == []


def test_a_port_in_use_is_told_to_the_process_that_listens_there(initialized: list[Any]) -> None:
    with socket.create_server(("", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        with user_error(f"--coordinator={where}: process 0 cannot listen", "choose another"):
            join(where, 2, 0)
        assert initialized == []
        join(where, 2, 1)  # which only calls there
    join(where, 2, 0)
    assert initialized == [(where, 2, 1), (where, 2, 0)]


@pytest.mark.parametrize("arguments", [(None, None, None), ("[::1]:8476", 2, 1), ("host:65535", 3, 2),
                                       ("host:1", None, None)], ids=str)
def test_jax_is_asked_to_join_with_the_flags_as_they_are(initialized: list[Any], arguments: tuple[Any, ...]) -> None:
    join(*arguments)
    assert initialized == [arguments]
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers), "a process that has joined would be ended"


def test_the_service_that_is_asked_after_every_step_is_on_whatever_the_environment_says(initialized: list[Any]) -> None:
    jax.config.update("jax_enable_preemption_service", False)
    join("localhost:8476", 2, 1)
    assert jax.config.jax_enable_preemption_service  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [ValueError("coordinator_address should be defined.\nmore"), RuntimeError("late")])
def test_processes_that_are_not_found_out_are_told_with_the_flags_to_give(monkeypatch: pytest.MonkeyPatch,
                                                                          error: Exception) -> None:
    def initialize(*arguments: Any, **options: Any) -> None:
        raise error
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with user_error("--distributed: ", str(error).splitlines()[0], "--coordinator=HOST:PORT --processes=N --process=I"):
        join(None, None, None)


@pytest.mark.parametrize(("flags", "joins"), [
    ((False, None, None, None), False), ((True, None, None, None), True), ((False, "localhost:8476", None, None), True),
    ((False, None, 2, None), True), ((False, None, 1, 0), True)], ids=str)
def test_any_flag_about_processes_makes_this_one_of_several(initialized: list[Any], flags: tuple[Any, ...],
                                                            joins: bool) -> None:
    with jax_runtime(*flags, debug_nans=False):
        pass
    assert initialized == ([flags[1:]] if joins else [])


@pytest.mark.parametrize("process", [0, 1])
def test_errors_of_several_processes_name_theirs(monkeypatch: pytest.MonkeyPatch, process: int) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    stdout = sys.stdout
    with user_error(f"process {process}: the user's mistake"), jax_runtime(False, None, None, None, False):
        assert sys.stdout is stdout
        raise UserError("the user's mistake")
    assert bool(waited) == (process == 0), "the first one leaves time to the others, which JAX ends once it is gone"


def test_the_first_process_alone_prints_what_stopped_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process, expected in ((0, Interrupted), (1, SystemExit)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        with pytest.raises(expected) as ended, jax_runtime(False, None, None, None, False):
            raise Interrupted(signal.SIGTERM, "saved")
        assert (ended.value.code if process else ended.value.exit_code) == 143


# From the command line

def main(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(MAIN), "--noreport", *arguments], cwd=cwd,
                          env={**user_environment(), **environment},
                          text=True, capture_output=True, timeout=300)


def test_a_platform_that_jax_does_not_know_is_told_in_one_line(tmp_path: Path) -> None:
    done = main(cwd=tmp_path, JAX_PLATFORMS="nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: JAX cannot use the devices: [^\n]*nonsense[^\n]* unset JAX_PLATFORMS\.\n", done.stderr)
    assert os.listdir(tmp_path) == []


_ALONE = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
from shared_basis.runtime import distributed
distributed.JOINING_SECONDS = 3
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_waits_in_vain_for_the_others_says_so(tmp_path: Path, process: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, str(ROOT), str(MAIN), f"--coordinator=127.0.0.1:{port}", "--processes=2",
         f"--process={process}"], cwd=tmp_path, env=user_environment(), text=True, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    errors = [line for line in done.stderr.splitlines() if not re.match(r"[IWE]\d{4} ", line)]  # those are JAX's own
    assert len(errors) == 1
    assert errors[0].startswith(f"error: the 2 processes could not connect at 127.0.0.1:{port} within 3 seconds")
    assert os.listdir(tmp_path) == []


# A batch in parts (its figures: tests/training/test_steps.py)

@pytest.mark.slow
def test_a_run_in_parts_is_the_same_on_any_number_of_devices(one: Path, tmp_path: Path) -> None:
    for count in (1, 4):
        trained(tmp_path / str(count), count, {"optimizer.grad_accumulation_steps": 2})
    assert_runs_close(tmp_path / "4", tmp_path / "1")
    losses = [read_metrics(workdir)[-1]["train_loss"] for workdir in (tmp_path / "1", one)]
    assert abs(losses[0] - losses[1]) > 1e-3, "batch normalisation saw the whole batch"
