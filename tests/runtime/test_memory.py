"""Memory: what a run is said to take is what it takes, and what cannot be had is told before it is missed."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, Watcher, mesh_of, read_arrays, refusal, tiny_network, user_error

from shared_basis import data
from shared_basis.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, replace
from shared_basis.data import feeds
from shared_basis.errors import UserError
from shared_basis.models.parameters import abstract_variables, count_parameters
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runtime.distributed import batch_sharding, jax_runtime, make_mesh, replicated
from shared_basis.runtime.memory import Memory, advice, bytes_on_device, check, measure, oom_as_user_error
from shared_basis.runtime.reporter import Reporter, size_text
from shared_basis.training import program as program_module
from shared_basis.training import train as train_module
from shared_basis.training.steps import TrainState

KIB, MIB, GIB = 2**10, 2**20, 2**30

CONFIG = Config(
    model=ModelConfig(name=TINY), data=DataConfig(train_examples=44, test_examples=30),
    optimizer=OptimizerConfig(learning_rate=0.05), train=TrainConfig(epochs=2, batch_size=8))

EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.\n  in several lines"


def abstract(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def state_of(params: Any, batch_stats: Any, opt_state: Any) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, opt_state, {})


def compiled_with(**sizes: int) -> Any:
    """Returns what a compiled step says of itself, in bytes."""
    analysis = types.SimpleNamespace(**{f"{name}_size_in_bytes": sizes.get(name, 0)
                                        for name in ("temp", "output", "alias", "argument", "generated_code")})
    return types.SimpleNamespace(memory_analysis=lambda: analysis)


# What is measured

@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(("dtype", "size"), [(jnp.float32, 4), (jnp.bfloat16, 2), (jnp.uint8, 1), (jnp.int32, 4)])
def test_a_device_holds_all_of_what_is_replicated_and_its_part_of_what_is_divided(devices: int, dtype: Any,
                                                                                  size: int) -> None:
    mesh = mesh_of(devices)
    for make in (abstract, lambda shape, dtype, sharding: jax.device_put(jnp.zeros(shape, dtype), sharding)):
        tree = {"whole": make((8, 3, 5), dtype, replicated(mesh)), "part": [make((8, 7), dtype, batch_sharding(mesh))],
                "scalar": make((), dtype, replicated(mesh)), "nothing": (make((0, 9), dtype, replicated(mesh)),)}
        assert bytes_on_device(tree) == size * (8 * 3 * 5 + 8 * 7 // devices + 1)
    assert bytes_on_device({}) == 0


@pytest.mark.parametrize("devices", [1, 4])
def test_the_parts_of_a_state_are_measured_by_what_they_are_for(devices: int) -> None:
    everywhere = replicated(mesh_of(devices))
    state = state_of({"kernel": abstract((3, 3, 16, 32), jnp.float32, everywhere)},
                     {"mean": abstract((32,), jnp.float32, everywhere)},
                     ({"trace": abstract((3, 3, 16, 32), jnp.float32, everywhere)},
                      abstract((), jnp.int32, everywhere)))
    found = measure(state, 12345, compiled_with(temp=10 * MIB, output=3 * MIB, alias=2 * MIB, argument=7 * MIB))
    assert found == Memory(parameters=4 * (3 * 3 * 16 * 32 + 32), optimizer=4 * (3 * 3 * 16 * 32 + 1), data=12345,
                           step=11 * MIB)
    assert found.total == 4 * (2 * 3 * 3 * 16 * 32 + 33) + 12345 + 11 * MIB


def test_a_backend_that_analyses_nothing_leaves_the_step_out() -> None:
    found = measure(state_of({"a": abstract((3,), jnp.float32, replicated(mesh_of(1)))}, {}, ()), 5,
                    types.SimpleNamespace(memory_analysis=lambda: None))
    assert found == Memory(12, 0, 5, 0)


@pytest.mark.usefixtures("optimized")
def test_the_step_of_a_known_program_is_its_intermediate_and_its_result() -> None:
    """One array of 1 MiB goes in and is held through; a new one of 4 MiB comes out."""
    compiled = jax.jit(lambda x: jnp.concatenate([jnp.sort(x)] * 4)).lower(
        jax.ShapeDtypeStruct((MIB // 4,), jnp.float32)).compile()
    step = measure(state_of({}, {}, ()), 0, compiled).step
    assert 4 * MIB <= step <= 8 * MIB
    donated = jax.jit(lambda x: x + 1, donate_argnums=0).lower(jax.ShapeDtypeStruct((MIB,), jnp.float32)).compile()
    assert measure(state_of({}, {}, ()), 0, donated).step < MIB


def program(config: Config, tmp_path: Path, **changes: Any) -> program_module.Program:
    """Returns the compiled program of a run of the tiny network, with `changes`, on all devices."""
    mesh = make_mesh()
    images = feeds.load(data.open_source(config.data), config.data, mesh, Reporter(verbosity="quiet"))
    model = tiny_network(**changes)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    _, built = program_module.build(config, images, model, mesh, checkpoints)
    checkpoints.close()
    return built


@pytest.mark.slow
def test_a_run_takes_four_bytes_for_each_parameter_statistic_and_momentum(tmp_path: Path) -> None:
    found = program(CONFIG, tmp_path).memory
    variables = abstract_variables(tiny_network(), (8, 8, 1))
    parameters = sum(count_parameters(variables["params"]).values())
    statistics = sum(count_parameters(variables["batch_stats"]).values())
    assert found.parameters == 4 * (parameters + statistics)
    links = 2  # the penalty and the schedule count their updates
    assert found.optimizer == 4 * (parameters + links)
    assert found.step > 0


@pytest.mark.slow
def test_parameters_and_statistics_take_as_much_where_the_network_computes_in_bfloat16(tmp_path: Path) -> None:
    single = program(CONFIG, tmp_path / "single").memory
    half = program(CONFIG, tmp_path / "half", dtype=jnp.bfloat16).memory
    assert (half.parameters, half.optimizer, half.data) == (single.parameters, single.optimizer, single.data)


def test_resident_images_of_all_splits_are_counted(tmp_path: Path) -> None:
    """Training images lie on each device with their labels and their order; test images are divided among four."""
    assert program(CONFIG, tmp_path).memory.data == 44 * (64 + 4 + 4) + 30 * (64 + 4) // 4


@pytest.mark.slow
def test_two_batches_of_a_stream_are_counted(tmp_path: Path) -> None:
    """Eight images of a batch are two on each of four devices."""
    config = replace(CONFIG, {"data.placement": "stream", "data.workers": 0})
    assert program(config, tmp_path).memory.data == 2 * 2 * (64 + 4)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_step_of_a_larger_batch_takes_more(tmp_path: Path) -> None:
    small, large = (program(replace(CONFIG, {"train.batch_size": size, "data.image_size": 32}),
                            tmp_path / str(size)).memory.step for size in (8, 40))
    assert 2 * small < large < 10 * small


def test_the_line_holds_all_figures() -> None:
    line = Memory(parameters=3 * KIB, optimizer=5 * MIB, data=7 * GIB, step=GIB).render()
    assert line == ("memory per device: 3.0 KiB for parameters, 5.0 MiB for the optimizer, 7.0 GiB for data; "
                    "8.0 GiB with the step at its peak")


def test_a_run_begins_with_what_it_takes(tmp_path: Path) -> None:
    reporter = Watcher()
    train_module.train(CONFIG, tmp_path / "run", reporter)
    state = read_arrays(tmp_path / "run", 10)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state["params"], state["batch_stats"])))
    optimizer = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state["opt_state"]))
    images = 44 * 72 + 30 * 68 // 4
    line, = (line for line in reporter.text.getvalue().splitlines() if "memory per device" in line)
    assert line.startswith("ready in ")
    for part in (f"{size_text(size)} for parameters", f"{size_text(optimizer)} for the optimizer",
                 f"{size_text(images)} for data", "with the step at its peak"):
        assert part in line


# What is refused

def devices_of(platform: str, limit: int | None, count: int = 1) -> Any:
    """Returns a mesh of devices that say they have `limit` bytes."""
    stats = None if limit is None else {"bytes_limit": limit}
    device = types.SimpleNamespace(platform=platform, memory_stats=lambda: stats)
    mesh = types.SimpleNamespace(devices=np.array([device] * count), size=count)
    return types.SimpleNamespace(local_mesh=mesh)


IMAGES_LARGEST = Memory(parameters=KIB, optimizer=KIB, data=3 * GIB, step=GIB)
STEP_LARGEST = Memory(parameters=KIB, optimizer=KIB, data=GIB, step=3 * GIB)


@pytest.mark.parametrize(("needed", "part", "other"), [
    (IMAGES_LARGEST, "The largest part is the images: set --config.data.placement=stream.", "train.batch_size"),
    (STEP_LARGEST, "The largest part is the step: set a smaller --config.train.batch_size", "placement")],
    ids=["images", "step"])
def test_what_an_accelerator_has_not_is_refused_with_the_largest_part(needed: Memory, part: str, other: str) -> None:
    with user_error("out of memory", needed.render(), "of 2.0 GiB", part) as caught:
        check(needed, CONFIG, devices_of("gpu", 2 * GIB, count=4))
    assert other not in str(caught.value)
    assert "4 devices" not in str(caught.value), "each accelerator has its own"


@pytest.mark.parametrize("limit", [4 * GIB + 2 * KIB, None, 5 * GIB])
def test_what_an_accelerator_has_or_does_not_tell_is_tried(limit: int | None) -> None:
    silent = types.SimpleNamespace(local_mesh=types.SimpleNamespace(devices=np.array(
        [types.SimpleNamespace(platform="gpu", memory_stats=lambda: {})]), size=1))
    for devices in (devices_of("tpu", limit), silent):
        assert refusal(check, IMAGES_LARGEST, CONFIG, devices) == ""


def test_a_byte_less_is_too_little() -> None:
    with user_error("out of memory"):
        check(IMAGES_LARGEST, CONFIG, devices_of("gpu", IMAGES_LARGEST.total - 1))


def test_devices_of_the_processor_share_its_memory_and_have_their_images_already() -> None:
    needed = 4 * (STEP_LARGEST.total - STEP_LARGEST.data)
    check(STEP_LARGEST, CONFIG, devices_of("cpu", None, count=4), lambda: needed)
    with user_error("× 4 devices, of 16.0 GiB", "the step: set a smaller --config.train.batch_size, or a smaller "
                    "--config.data.image_size"):
        check(STEP_LARGEST, CONFIG, devices_of("cpu", None, count=4), lambda: needed - 1)
    check(STEP_LARGEST, CONFIG, devices_of("cpu", None, count=3), lambda: needed - 1)
    check(STEP_LARGEST, CONFIG, devices_of("cpu", None, count=4), lambda: None)


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_accelerators_are_advised_to_accumulate_and_others_are_not(monkeypatch: pytest.MonkeyPatch,
                                                                   backend: str) -> None:
    """On CPU it saves no memory; in an evaluation there is nothing to accumulate."""
    config = replace(CONFIG, {"optimizer.grad_accumulation_steps": 4})
    assert "grad_accumulation_steps" not in advice(config, STEP_LARGEST)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert advice(config, STEP_LARGEST) == (
        "The largest part is the step: set --config.optimizer.grad_accumulation_steps=8 or more, a smaller "
        "--config.train.batch_size, or a smaller --config.data.image_size.")
    assert "grad_accumulation_steps" not in advice(config, IMAGES_LARGEST)
    assert "grad_accumulation_steps" not in advice(config, batch="train.eval_batch_size")


def test_where_the_parts_are_not_known_all_fields_are_named() -> None:
    assert advice(CONFIG, batch="train.eval_batch_size") == (
        "To reduce it, set a smaller --config.train.eval_batch_size, or a smaller --config.data.image_size, or set "
        "--config.data.placement=stream.")


def test_a_run_without_the_memory_is_refused_before_its_first_step(tmp_path: Path) -> None:
    """The activations of 1,024 images of 1024×1024 pixels are hundreds of GiB."""
    reporter = Watcher()
    config = replace(CONFIG, {"data.train_examples": 0, "data.placement": "stream", "data.workers": 0,
                              "data.image_size": 1024, "train.batch_size": 1024})
    with user_error("out of memory: memory per device: ", "× 4 devices", "The largest part is the step",
                    "--config.train.batch_size"):
        train_module.train(config, tmp_path / "run", reporter)
    assert reporter.steps == []
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps == []


# What fails all the same

@pytest.mark.parametrize("error", [
    jax.errors.JaxRuntimeError(EXHAUSTED), MemoryError(), MemoryError("Unable to allocate")], ids=repr)
def test_a_failed_allocation_is_told_in_one_line(error: Exception) -> None:
    text = " ".join(str(error).split()) or "MemoryError"
    with user_error(f"out of memory ({text}). To reduce it, set a smaller --config.train.batch_size",
                    " Saved: checkpoint 7."), oom_as_user_error(CONFIG, saved=lambda: " Saved: checkpoint 7."):
        raise error


def test_the_allocation_of_numpy_is_one_too() -> None:
    with (user_error("Unable to allocate", "--config.train.eval_batch_size"),
          oom_as_user_error(CONFIG, "train.eval_batch_size")):
        np.empty(2**60, np.uint8)


@pytest.mark.parametrize("error", [
    jax.errors.JaxRuntimeError("INTERNAL: something else"), jax.errors.JaxRuntimeError(""), ValueError("no memory"),
    UserError("RESOURCE_EXHAUSTED is what he said"), KeyboardInterrupt(),
    OSError(12, "Cannot allocate memory")], ids=repr)
def test_other_errors_are_left_alone(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, oom_as_user_error(CONFIG):
        raise error
    assert caught.value is error


def test_a_long_message_is_cut() -> None:
    with user_error() as caught, oom_as_user_error(CONFIG):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {'buffer ' * 10_000}")
    assert len(str(caught.value)) < 500


def test_of_several_processes_the_loss_of_another_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with (user_error("another process was lost (UNAVAILABLE: connection closed)", "Saved: nothing", "Start all"),
          oom_as_user_error(CONFIG, saved=lambda: " Saved: nothing.")):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: connection\nclosed")
    with user_error("out of memory (RESOURCE_EXHAUSTED"), oom_as_user_error(CONFIG):
        raise jax.errors.JaxRuntimeError(EXHAUSTED)
    closed = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")  # as JAX raises some of them
    with user_error("another process was lost (UNKNOWN: Gloo AllGather failed"), oom_as_user_error(CONFIG):
        raise closed
    with user_error("process 0: another process was lost (UNKNOWN: Gloo"), jax_runtime(False, None, None, None, False):
        raise closed
    for context in (oom_as_user_error(CONFIG), jax_runtime(False, None, None, None, False)):
        with pytest.raises(ValueError, match="x must be positive"), context:
            raise ValueError("x must be positive")


class Failing(Watcher):
    """Has training fail when it makes a step."""

    def __init__(self, step: int, error: Exception) -> None:
        super().__init__()
        self._step, self._error = step, error

    def show_progress(self, done: int, total: int, text: str) -> None:
        if done == self._step:
            raise self._error


@pytest.mark.parametrize(("at", "saved", "error"), [
    pytest.param(1, "no checkpoint yet", jax.errors.JaxRuntimeError(EXHAUSTED), marks=pytest.mark.slow),
    (7, "checkpoint 5 in ", MemoryError())],
    ids=["JAX, at once", "Python, later"])
def test_memory_that_fails_in_training_is_told_with_what_is_saved(tmp_path: Path, at: int, saved: str,
                                                                  error: Exception) -> None:
    with user_error("out of memory", "--config.train.batch_size", f"Saved: {saved}"):
        train_module.train(CONFIG, tmp_path / "run", Failing(at, error))
    steps = Checkpoints(tmp_path / "run" / "checkpoints").steps
    assert steps == ([5] if at > 5 else [])


def test_another_failure_in_training_is_not_taken_for_want_of_memory(tmp_path: Path) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        train_module.train(CONFIG, tmp_path / "run", Failing(3, jax.errors.JaxRuntimeError("INTERNAL: a bug")))
