"""What a run may change when it goes on, and what the message says where it may not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import refusal, user_error

from shared_basis.config import ADJUSTABLE_FIELDS, Config, OptimizerConfig, TrainConfig, replace
from shared_basis.errors import UserError
from shared_basis.runs.continuation import past_rates, require_continuation, settled_from
from shared_basis.runs.workdir import Workdir, make_record

IMAGES, STEPS = 40, 10
"""With batches of 8 five steps an epoch: two epochs are trained."""

CONSTANT = Config(train=TrainConfig(epochs=2, batch_size=8))
FALLING = replace(CONSTANT, {"optimizer.boundaries": (1.0,), "optimizer.factors": (0.1,)})
PARTS = replace(CONSTANT, {"optimizer.boundaries": (0.5,), "optimizer.factors": (0.1,)})
COSINE = replace(CONSTANT, {"optimizer.schedule": "cosine"})


def go_on(now: Config, then: Config, step: int = STEPS) -> None:
    require_continuation(Path("run"), now, then, IMAGES, step)


OTHER_VALUES = {"name": "other", "train.eval_batch_size": 7, "train.evaluate_every": 5,
                "train.checkpoint_minutes": 7.5, "data.placement": "stream", "data.on_broken": "skip",
                "data.workers": 2, "data.directory": "/moved", "data.manual_directory": "/moved"}


def test_what_does_not_change_what_is_trained_may_change() -> None:
    assert set(OTHER_VALUES) == set(ADJUSTABLE_FIELDS)
    then = replace(CONSTANT, {"data.name": "cifar10"})
    for field, value in OTHER_VALUES.items():
        go_on(replace(then, {field: value}), then)


def test_a_teacher_may_have_moved_and_neither_come_nor_go() -> None:
    here, there = (replace(CONSTANT, {"distillation.teacher": teacher}) for teacher in ("/here", "/there"))
    assert refusal(go_on, here, there) == ""
    for now, then in ((here, CONSTANT), (CONSTANT, here)):
        with user_error("distillation.teacher: "):
            go_on(now, then)


@pytest.mark.parametrize(("now", "then"), [
    (replace(CONSTANT, {"train.epochs": 9}), CONSTANT), (replace(FALLING, {"train.epochs": 9}), FALLING),
    (replace(FALLING, {"optimizer.boundaries": (1.0, 2.0), "optimizer.factors": (0.1, 0.5), "train.epochs": 3}),
     FALLING),
    (replace(PARTS, {"train.epochs": 4, "optimizer.boundaries": (1.0,)}), PARTS),
    (replace(CONSTANT, {"train.epochs": 4, "optimizer.schedule": "piecewise", "optimizer.boundaries": (0.5,),
                        "optimizer.factors": (0.1,)}), CONSTANT)],
    ids=["constant", "piecewise", "a further boundary", "the same boundary in epochs", "first boundary at the end"])
def test_more_epochs_are_taken_where_the_past_is_the_same(now: Config, then: Config) -> None:
    assert refusal(go_on, now, then) == ""
    assert refusal(go_on, then, now) == ""  # fewer, but not fewer than are trained


@pytest.mark.parametrize(("now", "then", "parts"), [
    (replace(COSINE, {"train.epochs": 4}), COSINE, ("train.epochs: 4 now, 2 there", "cosine schedule falls to 0")),
    (replace(PARTS, {"train.epochs": 4}), PARTS, ("fractions of the run", "--config.optimizer.boundaries='(1.0,)'")),
    (replace(CONSTANT, {"optimizer.learning_rate": 0.2}), CONSTANT, ("optimizer.learning_rate: 0.2 now, 0.1 there",)),
    (replace(CONSTANT, {"optimizer.warmup_epochs": 0.5}), CONSTANT, ("optimizer.warmup_epochs",)),
    (replace(CONSTANT, {"optimizer.schedule": "cosine"}), CONSTANT, ("cosine",))])
def test_another_learning_rate_in_the_past_is_refused(now: Config, then: Config, parts: tuple[str, ...]) -> None:
    with user_error("workdir run holds a run with another configuration", "the first 10 steps would have had other",
                    "--init=run", *parts):
        go_on(now, then)


def test_the_advice_to_give_boundaries_in_epochs_works() -> None:
    longer = replace(PARTS, {"train.epochs": 4})
    with pytest.raises(UserError) as caught:
        go_on(longer, PARTS)
    flag = re.search(r"--config\.(\S+)='(.+?)'", str(caught.value))
    assert flag is not None
    go_on(replace(longer, {flag[1]: tuple(map(float, flag[2].strip("(),").split(",")))}), PARTS)


def test_a_schedule_may_change_before_anything_is_trained() -> None:
    now = replace(COSINE, {"train.epochs": 9, "optimizer.learning_rate": 3.0})
    assert refusal(go_on, now, COSINE, 0) == ""
    assert "optimizer.learning_rate: 3.0 now" in refusal(go_on, now, COSINE, STEPS)


def test_fewer_epochs_than_are_trained_are_refused() -> None:
    with user_error("train.epochs=1", "has trained 2 epochs already", "--workdir"):
        go_on(replace(CONSTANT, {"train.epochs": 1}), CONSTANT)


@pytest.mark.parametrize("change", [{"seed": 1}, {"train.batch_size": 4}, {"train.record_gradients": True},
                                    {"optimizer.momentum": 0.5}, {"data.flip": True}, {"data.mean": (0.1,)}])
def test_all_else_is_refused_with_what_to_do(change: dict[str, Any]) -> None:
    field, value = next(iter(change.items()))
    for step in (0, STEPS):
        with user_error("another configuration", f"{field}: {value!r} now", "--workdir", "--init=run"):
            go_on(replace(CONSTANT, {**change, "train.epochs": 3}), CONSTANT, step)


def test_what_is_left_open_is_as_it_was_settled() -> None:
    open_ = replace(CONSTANT, {"data.mean": (), "data.std": (), "train.batch_size": 0})
    go_on(open_, CONSTANT)
    go_on(CONSTANT, open_, step=0)
    assert settled_from(open_, CONSTANT) == {"data.mean": (0.5,), "data.std": (0.5,), "train.batch_size": 8}
    assert settled_from(CONSTANT, open_) == settled_from(CONSTANT, COSINE) == {}


def test_past_rates_are_those_of_the_schedule() -> None:
    np.testing.assert_allclose(past_rates(FALLING, 5, 7), [0.1] * 5 + [0.01] * 2, rtol=1e-6)
    np.testing.assert_allclose(past_rates(replace(CONSTANT, {"optimizer.warmup_epochs": 1.0}), 5, 6),
                               [0, 0.02, 0.04, 0.06, 0.08, 0.1], rtol=1e-6)


# The record

DATA = {"classes": ["a", "b"], "image_shape": [8, 8, 1], "train_examples": IMAGES}


def test_the_record_holds_what_a_run_goes_on_with(tmp_path: Path) -> None:
    run = Workdir(tmp_path / "run")
    run.claim(make_record(CONSTANT, DATA, "first device"))
    (run.checkpoints / "10").mkdir(parents=True)
    (run.checkpoints / "15.orbax-checkpoint-tmp").mkdir()
    assert run.latest_step == 10
    longer = replace(CONSTANT, {"train.epochs": 4, "train.evaluate_every": 2})
    run.claim(make_record(longer, DATA, "second device"))
    config, record = run.load()
    assert config == longer
    assert record["devices"] == "first device"
    with user_error("has trained 2 epochs already"):
        run.claim(make_record(replace(CONSTANT, {"train.epochs": 1}), DATA))
    assert run.load()[0] == longer


def test_a_run_that_has_saved_nothing_gives_way(tmp_path: Path) -> None:
    run = Workdir(tmp_path / "run")
    run.claim(make_record(CONSTANT, DATA, "first device"))
    (run.checkpoints / "10.orbax-checkpoint-tmp").mkdir(parents=True)
    other = make_record(FALLING, {**DATA, "train_examples": 1}, "second device")
    assert not run.has_begun
    run.claim(other)
    assert run.read_record() == other
    (run.checkpoints / "10").mkdir()
    assert run.has_begun
    with user_error("another configuration"):
        run.claim(make_record(COSINE, DATA))
    given = Workdir(tmp_path / "given")
    given.claim(make_record(CONSTANT, DATA, init={"source": "weights"}))
    assert given.has_begun  # even if its first checkpoint was lost


def test_directories_are_recorded_as_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = replace(CONSTANT, {"data.name": "cifar10", "data.directory": "images", "data.manual_directory": "~/x"})
    data = make_record(config, DATA)["config"]["data"]
    assert (data["directory"], data["manual_directory"]) == (str(tmp_path / "images"), str(Path.home() / "x"))
    taught = make_record(replace(config, {"distillation.teacher": "runs/teacher:best"}), DATA)["config"]
    assert taught["distillation"]["teacher"] == str(tmp_path / "runs" / "teacher:best")
    far = make_record(replace(config, {"data.directory": "gs://bucket/x", "data.manual_directory": ""}), DATA)
    assert (far["config"]["data"]["directory"], far["config"]["data"]["manual_directory"]) == ("gs://bucket/x", "")


def test_records_of_earlier_versions_mean_what_they_meant(tmp_path: Path) -> None:
    import json
    record = make_record(replace(FALLING, {"train.epochs": 4, "optimizer.boundaries": (0.5,)}), DATA)
    del record["format"]  # all boundaries were epochs, and the digits took a directory
    record["config"]["data"] |= {"directory": "/ignored", "test": 0.5}
    (tmp_path / "run.json").write_text(json.dumps(record))
    config, _ = Workdir(tmp_path).load()
    assert config.optimizer.boundary_epochs(4) == (0.5,)
    assert config.data == Config().data
    kept = make_record(Config(optimizer=OptimizerConfig(boundaries=(0.5,), factors=(0.1,))), DATA)
    (tmp_path / "run.json").write_text(json.dumps(kept))
    assert Workdir(tmp_path).load()[0].optimizer.boundary_epochs(300) == (150.0,)
