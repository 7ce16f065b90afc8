"""Checkpoints: what is saved comes back, the right ones stay, and plain Orbax can read them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from gcs_emulator import Emulator
from helpers import Linear, assert_trees_equal, mesh_of, user_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared_basis.errors import UserError
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runs.metrics import chosen_on
from shared_basis.runs.workdir import Workdir
from shared_basis.runtime.distributed import replicated
from shared_basis.runtime.files import Place, as_path
from shared_basis.training.steps import TrainState, create_train_state

RECORD = {"config": {"seed": 3}, "data": {"classes": ["a", "b"]}, "versions": {"jax": "0"}}


def make_state(step: int, devices: int = 4) -> TrainState:
    """Returns a training state whose arrays are all different, random, and of their own types."""
    state = jax.eval_shape(lambda: create_train_state(Linear(batch=2), optax.sgd(0.1, momentum=0.9), 0, (8, 8, 1)))
    rng = np.random.default_rng(step)
    filled = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), state)
    filled = filled.replace(step=np.asarray(step, np.int32))
    return jax.device_put(filled, replicated(mesh_of(devices)))


def target(devices: int = 4) -> TrainState:
    """Returns the shapes, types and shardings of `make_state`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
                        make_state(0, devices))


def save(directory: Place, accuracies: dict[int, float | None]) -> None:
    """Saves `make_state` of each step with its test accuracy, or without metrics."""
    checkpoints = Checkpoints(directory)
    for step, accuracy in accuracies.items():
        checkpoints.save(step, make_state(step), RECORD, None if accuracy is None else {"test_accuracy": accuracy})
    checkpoints.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a directory of checkpoints 10 (the best), 20 and 30; for reading only."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    save(directory, {10: 0.75, 20: 0.25, 30: 0.5})
    return directory


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """Returns a copy of `saved`, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_a_state_comes_back_bit_for_bit(saved: Path) -> None:
    checkpoints = Checkpoints(saved)
    for step in checkpoints.steps:
        assert_trees_equal(checkpoints.restore(step, target()), make_state(step))


def test_a_state_comes_back_on_another_number_of_devices(saved: Path) -> None:
    for devices in (1, 2):
        restored = Checkpoints(saved, read_only=True).restore(30, target(devices))
        assert_trees_equal(restored, make_state(30))
        assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(restored)} == {devices}


@pytest.mark.parametrize(("accuracies", "kept", "best"), [
    ({10: 0.3, 20: 0.9, 30: 0.4, 40: 0.5, 50: 0.6}, [20, 40, 50], 20),
    ({10: 0.9, 20: 0.1, 30: 0.9, 40: 0.1, 50: 0.1}, [30, 40, 50], 30),
    ({10: 0.9, 20: None, 30: None, 40: None}, [10, 30, 40], 10),
    ({10: None, 20: None, 30: None}, [20, 30], 30),
    ({10: 0.9, 20: 0.1, 30: 0.2, 40: None, 50: None, 60: None}, [10, 20, 30, 50, 60], 10),
    ({0: None, 10: 0.5, 15: None, 17: None, 19: None}, [0, 10, 17, 19], 10)])
def test_the_latest_two_of_all_and_of_the_evaluated_and_the_best_are_kept(
        tmp_path: Path, accuracies: dict[int, float | None], kept: list[int], best: int) -> None:
    save(tmp_path / "checkpoints", accuracies)
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert checkpoints.steps == kept
    assert checkpoints.find("best") == best
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == kept


@pytest.mark.parametrize(("metrics", "chosen"), [
    ({"test_accuracy": 0.9, "validation_accuracy": 0.1}, "validation"), ({"test_accuracy": 0.9}, "test"),
    ({"train_accuracy": 0.9}, None), ({}, None)])
def test_validation_images_choose_the_best_and_test_images_where_there_are_none(metrics: dict[str, float],
                                                                                 chosen: str | None) -> None:
    assert chosen_on(metrics) == chosen


def test_the_best_by_validation_is_kept_whatever_its_test_accuracy(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step, validation, test in ((10, 0.3, 0.9), (20, 0.9, 0.1), (30, 0.4, 0.8), (40, 0.5, 0.7)):
        checkpoints.save(step, make_state(step), RECORD, {"validation_accuracy": validation, "test_accuracy": test})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert (checkpoints.steps, checkpoints.find("best")) == ([20, 30, 40], 20)


def test_the_best_survives_a_run_that_is_opened_again_and_again(tmp_path: Path) -> None:
    for step, accuracy in ((10, 0.9), (20, 0.1), (30, None), (40, 0.5)):
        save(tmp_path, {step: accuracy})
    assert Checkpoints(tmp_path).steps == [10, 20, 30, 40]
    assert Checkpoints(tmp_path).metrics(10) == {"test_accuracy": 0.9}


def test_checkpoints_are_found_by_what_a_user_types(saved: Path) -> None:
    checkpoints = Checkpoints(saved, read_only=True)
    assert [checkpoints.find(which) for which in ("latest", "best", "10", "30")] == [30, 10, 10, 30]
    for which in ("7", "newest", "-10", "", "1e1", "²"):
        with user_error(f"checkpoint {which!r}", "latest", "best", "10, 20, 30"):
            checkpoints.find(which)


def test_a_run_before_its_first_checkpoint_can_be_opened_for_reading(tmp_path: Path) -> None:
    with user_error("no checkpoint yet"):
        Checkpoints(tmp_path / "absent", read_only=True).find("latest")
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_checkpoints_are_to_be_is_told_before_training(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with user_error(str(tmp_path / "checkpoints"), "cannot be opened", "File exists"):
        Checkpoints(tmp_path / "checkpoints")


def test_what_was_saved_does_not_change_when_the_state_is_donated(tmp_path: Path) -> None:
    double = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 2 + 1, state), donate_argnums=0)
    checkpoints, state = Checkpoints(tmp_path), make_state(5)
    checkpoints.save(5, state, RECORD, None)
    for _ in range(20):
        state = double(state)
    checkpoints.close()
    assert_trees_equal(Checkpoints(tmp_path).restore(5, target()), make_state(5))


def test_saving_a_step_twice_keeps_the_first(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, make_state(5), RECORD, {"test_accuracy": 0.5})
    checkpoints.save(5, make_state(6), RECORD, None)
    checkpoints.close()
    assert_trees_equal(Checkpoints(tmp_path).restore(5, target()), make_state(5))
    assert Checkpoints(tmp_path).metrics(5) == {"test_accuracy": 0.5}


def test_metrics_are_added_to_a_checkpoint_that_is_never_away(tmp_path: Path) -> None:
    save(tmp_path, {5: None})
    before = {path: path.read_bytes() for path in (tmp_path / "5" / "state").rglob("*") if path.is_file()}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, make_state(5), RECORD, {"test_accuracy": 0.5})
    assert checkpoints.metrics(5) == {"test_accuracy": 0.5}
    for step, accuracy in ((6, 0.25), (7, 0.25), (8, 0.25), (9, None), (10, None)):
        checkpoints.save(step, make_state(step), RECORD, None if accuracy is None else {"test_accuracy": accuracy})
    checkpoints.close()
    again = Checkpoints(tmp_path)
    assert again.steps == [5, 7, 8, 9, 10]  # 5 is the best
    assert again.find("best") == 5
    assert again.metrics(5) == {"test_accuracy": 0.5}
    assert_trees_equal(again.restore(5, target()), make_state(5))
    assert {path: path.read_bytes() for path in before} == before


def test_plain_orbax_opens_a_checkpoint(saved: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(saved / "20" / "state")
    state = make_state(20)
    assert set(tree) == {"step", "params", "batch_stats", "opt_state", "totals"}
    assert_trees_equal({name: tree[name] for name in ("step", "params", "batch_stats", "totals")},
                       {"step": state.step, "params": state.params, "batch_stats": state.batch_stats,
                        "totals": state.totals})
    for one, other in zip(jax.tree.leaves(tree["opt_state"]), jax.tree.leaves(state.opt_state), strict=True):
        np.testing.assert_array_equal(one, other)
    assert json.loads((saved / "20" / "run" / "metadata").read_text()) == RECORD


def test_plain_orbax_tells_the_shapes(saved: Path) -> None:
    handlers = {"state": ocp.StandardCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(saved, item_handlers=handlers) as manager:
        kernel = manager.item_metadata(20)["state"]["params"]["head"]["kernel"]
    assert (kernel.shape, kernel.dtype) == ((64, 10), jnp.float32)


def variables_target(devices: int = 1) -> dict[str, Any]:
    state = target(devices)
    return {"params": state.params, "batch_stats": state.batch_stats}


def test_variables_are_restored_and_the_optimizer_is_not_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    deserialize = ocp.type_handlers.ArrayHandler.deserialize

    def spy(self: Any, infos: Any, *args: Any, **kwargs: Any) -> Any:
        read.extend(info.name for info in infos)
        return deserialize(self, infos, *args, **kwargs)
    monkeypatch.setattr(ocp.type_handlers.ArrayHandler, "deserialize", spy)
    variables = Checkpoints(saved, read_only=True).restore_variables(20, variables_target())
    state = make_state(20)
    assert_trees_equal(variables, {"params": state.params, "batch_stats": state.batch_stats})
    assert sorted(read) == ["batch_stats.seen", "params.head.bias", "params.head.kernel"]


def test_a_read_that_fails_abandons_no_other(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax closes the loop to which threads report, and each of them prints a traceback."""
    ended: list[str] = []

    async def slow() -> None:
        await asyncio.sleep(0.2)
        ended.append("slow")

    async def deserialize(*_: Any) -> None:
        async def fail() -> None:
            raise ValueError("damaged")
        await asyncio.gather(slow(), fail())
    monkeypatch.setattr(ocp.type_handlers.ArrayHandler, "deserialize", deserialize)
    with user_error("checkpoint 30", "ValueError: damaged"):
        Checkpoints(saved, read_only=True).restore(30, target())
    assert ended == ["slow"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def largest(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "data truncated": lambda state: truncate(largest(state / "d")),
    "a bit flipped": lambda state: flip_bit(largest(state / "d")),
    "index deleted": lambda state: (state / "manifest.ocdbt").unlink(),
    "metadata truncated": lambda state: truncate(state / "_METADATA"),
    "state deleted": lambda state: shutil.rmtree(state),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_told_with_its_step(copied: Path, damage: str) -> None:
    DAMAGE[damage](copied / "30" / "state")
    checkpoints = Checkpoints(copied, read_only=True)
    for restore in (lambda: checkpoints.restore(30, target()),
                    lambda: checkpoints.restore_variables(30, variables_target())):
        with user_error("checkpoint 30", str(copied), "cannot be restored"):
            restore()
    assert_trees_equal(checkpoints.restore(20, target()), make_state(20))  # the others stay usable


@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.integers(0, 10**6), place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255),
       cut=st.booleans())
def test_whatever_byte_is_damaged_a_state_comes_back_as_it_was_or_not_at_all(
        saved: Path, tmp_path: Path, file: int, place: float, change: int, cut: bool) -> None:
    directory = tmp_path / "checkpoints"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(saved / "30", directory / "30")
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    path = found[file % len(found)]
    data = bytearray(path.read_bytes())
    index = int(place * len(data))
    if cut:
        data = data[:index]
    else:
        data[index] ^= change
    path.write_bytes(data)
    try:
        restored = Checkpoints(directory, read_only=True).restore(30, target())
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert_trees_equal(restored, make_state(30))


def test_a_checkpoint_that_was_never_completed_is_passed_over(copied: Path) -> None:
    (copied / "30").rename(copied / "30.orbax-checkpoint-tmp")
    assert Checkpoints(copied).find("latest") == 20


def test_damaged_metrics_are_told_and_leave_the_state_usable(copied: Path) -> None:
    damaged = copied / "30" / "metrics" / "metrics"
    truncate(damaged)
    with user_error(str(damaged), "delete that file"):
        Checkpoints(copied, read_only=True)
    damaged.unlink()
    checkpoints = Checkpoints(copied, read_only=True)
    assert_trees_equal(checkpoints.restore(checkpoints.find("latest"), target()), make_state(30))


@pytest.mark.parametrize("shape", [(64, 11), (65, 10)])
def test_a_state_of_other_shapes_is_told(saved: Path, shape: tuple[int, int]) -> None:
    other = target()
    kernel = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=replicated(mesh_of(4)))
    other = other.replace(params={"head": {**other.params["head"], "kernel": kernel}})
    with user_error("checkpoint 30", f"the shape of params/head/kernel is (64, 10) there and {shape} here"):
        Checkpoints(saved, read_only=True).restore(30, other)


def test_a_state_of_other_names_is_told(saved: Path) -> None:
    other = target()
    with user_error("checkpoint 30", "params/tail/bias is missing", "other checkpoints there: 10, 20"):
        Checkpoints(saved, read_only=True).restore(30, other.replace(params={"tail": other.params["head"]}))


def dropped(state: TrainState, dtype: Any) -> TrainState:
    kernel = jax.ShapeDtypeStruct((64, 10), dtype, sharding=replicated(mesh_of(4)))
    return state.replace(params={"head": {**state.params["head"], "kernel": kernel}})


@pytest.mark.parametrize(("change", "parts"), [
    (lambda state: dropped(state, jnp.bfloat16), ("the dtype of params/head/kernel is float32 there and bfloat16 here",
                                                  "JAX_ENABLE_X64")),
    (lambda state: state.replace(params={"head": {"kernel": state.params["head"]["kernel"]}}),
     ("params/head/bias is not part of this network",)),
    (lambda state: state.replace(params={**state.params, "tail": state.params["head"]}),
     ("params/tail/", "is missing")),
], ids=["precision", "array too many", "array too few"])
def test_a_state_that_orbax_would_convert_is_refused_by_name(saved: Path, change: Callable[[TrainState], TrainState],
                                                             parts: tuple[str, ...]) -> None:
    with user_error("checkpoint 30", "cannot be restored", *parts):
        Checkpoints(saved, read_only=True).restore(30, change(target()))


def test_the_latest_state_that_can_be_restored_is_found_and_the_damaged_are_set_aside(copied: Path) -> None:
    truncate(largest(copied / "30" / "state" / "d"))
    told: list[str] = []
    checkpoints = Checkpoints(copied, aside=copied.parent / "damaged", tell=told.append)
    assert_trees_equal(checkpoints.restore_latest(target()), make_state(20))
    assert checkpoints.steps == [10, 20]
    assert len(told) == 1
    assert "Checkpoint 30 is set aside as " in told[0]
    checkpoints.save(30, make_state(30), RECORD, {"test_accuracy": 0.5})
    checkpoints.close()
    assert_trees_equal(Checkpoints(copied, read_only=True).restore_latest(target()), make_state(30))


def test_all_processes_set_aside_what_the_first_has_found(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process that lists the directory when the first one has already moved what is damaged."""
    found = [str(copied / "20" / "metrics" / "metrics")]
    monkeypatch.setattr("shared_basis.runs.checkpoints.from_main_process", lambda text: json.dumps(found))
    told: list[str] = []
    checkpoints = Checkpoints(copied, aside=copied.parent / "damaged", tell=told.append)
    assert checkpoints.steps == [10, 30]
    assert len(told) == 1
    checkpoints.close()


def test_nothing_is_moved_where_it_may_not_be_or_nothing_is_intact(copied: Path) -> None:
    flip_bit(largest(copied / "30" / "state" / "d"))
    with user_error("checkpoint 30", "other checkpoints there: 10, 20."):
        Checkpoints(copied, read_only=True).restore_latest(target())
    for step in (10, 20):
        truncate(copied / str(step) / "state" / "_METADATA")
    with user_error("checkpoint 30", "other checkpoints there: 10, 20."):
        Checkpoints(copied, aside=copied.parent / "damaged").restore_latest(target())
    assert sorted(path.name for path in copied.iterdir()) == ["10", "20", "30"]
    assert not (copied.parent / "damaged").exists()


def test_what_there_is_can_be_told(saved: Path, tmp_path: Path) -> None:
    assert Checkpoints(saved, read_only=True).describe() == f"checkpoints 10, 20, 30 in {saved}"
    save(tmp_path / "one", {5: None})
    assert Checkpoints(tmp_path / "one", read_only=True).describe() == f"checkpoint 5 in {tmp_path / 'one'}"
    assert Checkpoints(tmp_path / "none", read_only=True).describe() == "no checkpoint yet"


def test_a_save_that_fails_in_the_background_is_told_also_on_closing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(ocp.CheckpointManager, "close", full)
    with user_error("a checkpoint cannot be saved", "No space left on device", "complete: no checkpoint yet"):
        Checkpoints(tmp_path).close()


# In a bucket

@pytest.fixture
def in_bucket(storage: Emulator) -> str:
    """Returns a directory in a bucket with checkpoints 10 (the best), 20 and 30."""
    directory = f"run{len(storage.requests)}/checkpoints"
    save(f"gs://bucket/{directory}", {10: 0.75, 20: 0.25, 30: 0.5})
    return directory


def test_checkpoints_in_a_bucket_are_as_those_on_a_disk(in_bucket: str) -> None:
    checkpoints = Checkpoints(f"gs://bucket/{in_bucket}", read_only=True)
    assert (checkpoints.steps, checkpoints.find("best")) == ([10, 20, 30], 10)
    assert checkpoints.metrics(20) == {"test_accuracy": 0.25}
    for step in (10, 20, 30):
        assert_trees_equal(checkpoints.restore(step, target()), make_state(step))
    assert checkpoints.describe() == f"checkpoints 10, 20, 30 in gs://bucket/{in_bucket}"


def test_a_save_to_a_bucket_counts_once_its_mark_is_there_and_else_is_removed(storage: Emulator,
                                                                             in_bucket: str) -> None:
    directory, run = f"gs://bucket/{in_bucket}", Workdir(as_path(f"gs://bucket/{in_bucket}").parent)
    assert run.saved_steps == [10, 20, 30]
    run.files.remove("checkpoints/30/commit_success.txt")  # which is written last
    assert Checkpoints(directory, read_only=True).steps == run.saved_steps == [10, 20]
    assert storage.names(prefix=f"{in_bucket}/30/"), "who only reads removes nothing"
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        assert_trees_equal(checkpoints.restore_latest(target()), make_state(20))
        checkpoints.save(40, make_state(40), RECORD, {"test_accuracy": 0.5})
    assert Checkpoints(directory, read_only=True).steps == [10, 20, 40]
    assert not storage.names(prefix=f"{in_bucket}/30/")


def test_a_damaged_checkpoint_in_a_bucket_is_set_aside(storage: Emulator, in_bucket: str) -> None:
    directory, told = as_path(f"gs://bucket/{in_bucket}"), list[str]()
    name = max(storage.names(prefix=f"{in_bucket}/30/state/"), key=lambda name: len(storage.read(name)))
    storage.write(name, storage.read(name)[:-1] + b"?")
    files = [each.partition("/30/")[2] for each in storage.names(prefix=f"{in_bucket}/30/")]
    with contextlib.closing(Checkpoints(directory, aside=directory.parent / "damaged", tell=told.append)) as found:
        assert_trees_equal(found.restore_latest(target()), make_state(20))
        assert found.steps == [10, 20]
    assert f"Checkpoint 30 is set aside as {directory.parent}/damaged/30.1." in told[0]
    aside = f"{in_bucket.partition('/')[0]}/damaged/30.1/"
    assert [each.removeprefix(aside) for each in storage.names(prefix=aside)] == files
    assert not storage.names(prefix=f"{in_bucket}/30/")


def test_a_storage_that_cannot_be_reached_damages_nothing(storage: Emulator, in_bucket: str,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    from shared_basis.runtime import cloud_client

    directory = as_path(f"gs://bucket/{in_bucket}")
    checkpoints = Checkpoints(directory, aside=directory.parent / "damaged")
    names = storage.names()
    monkeypatch.setattr(cloud_client, "PATIENCE", 0.0)
    storage.fail(403)
    with user_error("checkpoint 30 in ", "cannot be restored"):
        checkpoints.restore_latest(target())
    storage.heal()
    assert storage.names() == names
