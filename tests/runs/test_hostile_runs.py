"""Workdirs from strangers: records and checkpoints are data, in which no name is imported and no path is followed."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY, save_run, user_error
from hostile import spoil, tree

from shared_basis.config import Config, ModelConfig, to_dict
from shared_basis.errors import UserError
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runs.trained import Trained
from shared_basis.runs.workdir import Workdir, make_record


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the workdir of a run with two checkpoints; for reading only."""
    return save_run(tmp_path_factory.mktemp("honest") / "run", Config(model=ModelConfig(name=TINY)),
                    {10: 0.5, 20: 0.6})


@pytest.fixture
def stranger(honest: Path, tmp_path: Path) -> Path:
    """Returns a copy of that run, to be spoilt."""
    return shutil.copytree(honest, tmp_path / "run")


RECORDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a class in Python's words": lambda record: record["config"].update({"__class__": "trap_module.X"}),
    "an object of jsonpickle": lambda record: record["config"].update(model={"py/object": "trap_module.X"}),
    "a method for a field": lambda record: record["config"].update({"__init__": 1}),
    "a configuration that is none": lambda record: record.update(config=None),
    "a module for a network": lambda record: record["config"]["model"].update(name="trap_module.X"),
    "a path for a name": lambda record: record["config"].update(name="../../outside"),
    "a seed beyond all limits": lambda record: record["config"].update(seed=10**4000),
    "a rate that is none": lambda record: record["config"]["optimizer"].update(learning_rate=float("nan")),
    "no classes": lambda record: record["data"].update(classes=[]),
    "images beyond all limits": lambda record: record["data"].update(image_shape=[10**9, 10**9, 10**9]),
    "no shape": lambda record: record["data"].update(image_shape=[]),
}


@pytest.mark.parametrize("change", RECORDS)
def test_a_record_is_data_and_is_checked(stranger: Path, trap: Path, change: str) -> None:
    record = json.loads((stranger / "run.json").read_text())
    RECORDS[change](record)
    (stranger / "run.json").write_text(json.dumps(record))
    with user_error():
        Trained.open(stranger)
    assert not trap.exists()


@pytest.mark.parametrize("words", ["[" * 100_000, '{"config":' * 100_000, '{"seed": ' + "9" * 5000 + "}", "\x00",
                                   '{"config": {}, "data": {"classes": [], "image_shape": []}, "versions": [1]}'],
                         ids=["deep", "deep dicts", "a number of many digits", "no text", "versions that are none"])
def test_a_record_that_is_none_is_told(stranger: Path, words: str) -> None:
    (stranger / "run.json").write_text(words)
    with user_error("run.json"):
        Workdir(stranger).require(make_record(Config(), {}))


def each_value(**fields: Any) -> Callable[[Any], None]:
    return lambda metadata: [leaf["value_metadata"].update(fields) for leaf in metadata["tree_metadata"].values()][:0]


def each_key(**fields: Any) -> Callable[[Any], None]:
    return lambda metadata: [key.update(fields) for leaf in metadata["tree_metadata"].values()
                             for key in leaf["key_metadata"]][:0]


HANDLERS, METADATA, SHARDING = "_CHECKPOINT_METADATA", "state/_METADATA", "state/_sharding"

METADATAS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "handlers": (HANDLERS, lambda found: found.update(item_handlers=dict.fromkeys(found["item_handlers"],
                                                                                  "trap_module.X"))),
    "a class": (HANDLERS, lambda found: found.update(custom_metadata={"__class__": "trap_module.X"})),
    "types of values": (METADATA, each_value(value_type="trap_module.X")),
    "keys that climb": (METADATA, each_key(key="../../../outside")),
    "a module": (METADATA, lambda found: found.update(custom_metadata={"module": "trap_module", "name": "X"})),
    "another driver": (METADATA, lambda found: found.update(use_zarr3=True, use_ocdbt=False)),
    "shardings": (SHARDING, lambda found: dict.fromkeys(found, json.dumps(
        {"sharding_type": "trap_module.X", "module": "trap_module", "device_str": "cpu:0"}))),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads that Orbax leaves unfinished
@pytest.mark.parametrize("change", [pytest.param(name, marks=[] if name == "a class"
                                                 else pytest.mark.slow) for name in METADATAS])
def test_names_in_the_metadata_of_a_checkpoint_are_not_imported(stranger: Path, trap: Path, change: str) -> None:
    """It is refused in one line, or read all the same: Orbax asks for little of what stands there."""
    name, spoiling = METADATAS[change]
    spoil(stranger / "checkpoints" / "20" / name, spoiling)
    refusals = []
    try:
        assert Trained.open(stranger, "20").step == 20
    except UserError as error:
        refusals.append(str(error))
    for message in refusals:
        assert "\n" not in message
        assert str(stranger / "checkpoints") in message
    gc.collect()
    assert not trap.exists()


@pytest.mark.parametrize("name", [HANDLERS, METADATA, SHARDING, "metrics/metrics"])
def test_metadata_of_great_depth_is_refused(stranger: Path, name: str) -> None:
    (stranger / "checkpoints" / "20" / name).write_text("[" * 100_000)
    with user_error(str(stranger / "checkpoints")):
        Trained.open(stranger, "20")


@pytest.mark.parametrize("metrics", ["[]", '{"test_accuracy": "0.9"}', '{"test_accuracy": [0.9]}', "null",
                                     '{"validation_accuracy": {"__class__": "trap_module.X"}}'])
def test_metrics_are_numbers(stranger: Path, trap: Path, metrics: str) -> None:
    (stranger / "checkpoints" / "20" / "metrics" / "metrics").write_text(metrics)
    with user_error("metrics"):
        Trained.open(stranger, "best")
    assert not trap.exists()


def test_a_damaged_checkpoint_that_links_elsewhere_is_set_aside_and_what_it_links_to_is_left(stranger: Path,
                                                                                             tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (stranger / "checkpoints" / "20").rename(outside)
    (outside / "metrics" / "metrics").write_text("damaged")
    (stranger / "checkpoints" / "20").symlink_to(outside)
    before = tree(outside)
    assert Checkpoints(stranger / "checkpoints", aside=stranger / "damaged").steps == [10]
    assert tree(outside) == before
    assert (stranger / "damaged" / "20.1").is_symlink()


def test_a_record_that_json_holds_is_all_that_is_written(honest: Path) -> None:
    """What was written can be read by any program: nothing in it is a pickle, or names a class of this package."""
    record = json.loads((honest / "run.json").read_text())
    assert record["config"] == to_dict(Config(model=ModelConfig(name=TINY)))
    for path in honest.rglob("*"):
        if path.is_file():
            assert not path.read_bytes().startswith(b"\x80")
            assert b"shared_basis" not in path.read_bytes()
