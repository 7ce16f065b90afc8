"""Random configurations, networks and command lines: each trains, or is refused in one line that names the field."""

from __future__ import annotations

import copy
import json
import math
import re
import string
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, TINY, CommandLine, Watcher, write_folder
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shared_basis import config as config_module
from shared_basis.cli.app import MODES, parse
from shared_basis.config import PARAMETER_LABELS, Config, from_config_dict, to_dict
from shared_basis.errors import UserError
from shared_basis.models import create_model
from shared_basis.models.parameters import abstract_variables
from shared_basis.models.registry import FAMILIES
from shared_basis.runtime.preemption import Interrupted
from shared_basis.training.train import train

FIELDS = sorted(config_module.flatten(to_dict(Config())))

THOROUGH = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


def one_line(error: BaseException) -> str:
    """Returns the message, after making sure that it is one line without control characters."""
    message = str(error)
    assert message
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    return message


# Configurations

ODD_TEXTS = ("", " ", ".", "..", "/", "a/b", "a\\b", "\x00", "two\nlines", "\x1b[2J", "\udcff", "ſ", "ﬁ", "🙂" * 3,
             "None", "nan", "0", "--", "x" * 300, "%s", "{0}", "[red]", "'\"", "\u2028")

ODD_NUMBERS = (0, -1, 1, 2, 3, 7, 8, 2**31 - 1, 2**31, 2**63, -2**63, 10**400, -10**400, 0.0, -0.0, 0.5, 1.0, 1.5,
               5e-324, 1e-30, 1e-6, 1e30, 1.1e30, 1e39, 1.7e308, math.nan, math.inf, -math.inf, True, False)

ODD_THINGS = (None, [], {}, [[]], [None], {"a": 1}, b"bytes", 1j, object, (1, 2), ("a",), np.float32(1.0), np.zeros(3),
              np.zeros(2000))

ANYTHING = st.one_of(st.sampled_from(ODD_TEXTS), st.sampled_from(ODD_NUMBERS), st.sampled_from(ODD_THINGS),
                     st.floats(), st.integers(), st.text(max_size=8),
                     st.lists(st.one_of(st.floats(), st.integers(-3, 3), st.text(max_size=3)), max_size=4))

CHOICES: dict[str, tuple[str, ...]] = {
    "model.stem": ("cifar", "imagenet"), "model.dtype": ("float32", "bfloat16", "float16"),
    "data.name": ("digits", "folder", "tfds:absent", "tfds:", "tfds:../x", "tfds:a/b:1.0.0", "cifar10", "cifar"),
    "data.crop": ("center", "random_resized"), "data.on_broken": ("fail", "skip"),
    "data.placement": ("auto", "device", "stream"), "orthogonality.elements": ("shared", "shared+unique"),
    "orthogonality.method": ("penalty", "exact", "none"), "orthogonality.reduction": ("mean", "sum"),
    "optimizer.schedule": ("piecewise", "cosine")}

USUAL: dict[str, st.SearchStrategy[Any]] = {
    **{name: st.sampled_from(choices) for name, choices in CHOICES.items()},
    "name": st.text(max_size=5), "model.name": st.sampled_from(("resnet14", "resnet20-s1u1-double", "resnet57")),
    "seed": st.integers(0, 2**31 - 1), "data.split_seed": st.integers(0, 2**31 - 1),
    "data.validation": st.floats(0, 1), "data.test": st.floats(0, 1), "data.image_size": st.integers(0, 12),
    "data.workers": st.integers(-2, 0), "data.train_examples": st.integers(0, 60),
    "data.test_examples": st.integers(0, 60), "data.pad": st.integers(0, 12), "data.flip": st.booleans(),
    "data.mean": st.lists(st.floats(-2, 2), min_size=1, max_size=3),
    "data.std": st.lists(st.floats(1e-7, 1e30), min_size=1, max_size=3),
    "orthogonality.weight": st.floats(0, 1e30), "optimizer.learning_rate": st.floats(0, 1e30),
    "optimizer.momentum": st.floats(0, 1), "optimizer.nesterov": st.booleans(),
    "optimizer.weight_decay": st.floats(0, 1e30), "optimizer.warmup_epochs": st.floats(0, 2),
    "optimizer.weight_decay_labels": st.lists(st.sampled_from((*PARAMETER_LABELS, "kernels")), max_size=3),
    "optimizer.boundaries": st.lists(st.floats(0, 3), max_size=3), "optimizer.factors": st.lists(
        st.floats(0, 10), max_size=3),
    "optimizer.grad_accumulation_steps": st.integers(1, 4), "train.epochs": st.integers(1, 3),
    "train.batch_size": st.sampled_from((4, 8, 12, 16, 10)), "train.eval_batch_size": st.integers(1, 50),
    "train.evaluate_every": st.integers(1, 4), "train.checkpoint_minutes": st.floats(0, 0.01),
    "train.record_gradients": st.booleans()}
"""Values that are mostly allowed, and small enough to be tried."""

SMALL = {"model.name": TINY, "data.train_examples": 40, "data.test_examples": 20, "train.epochs": 1,
         "train.batch_size": 8, "data.workers": 0}

RELATED = {
    "name": ("workdir", "run.json"), "data.name": ("data.directory", "TFDS"),
    "data.directory": ("data.directory", "images", "not a directory"),
    "data.crop": ("data.image_size", "data.placement"), "data.validation": ("data.validation",),
    "data.train_examples": ("train.batch_size",), "data.test": ("train.batch_size", "data.train_examples",
                                                                "data.test_examples", "image"),
    "data.validation_split": ("data.validation",), "optimizer.boundaries": ("optimizer.factors",),
    "optimizer.factors": ("optimizer.boundaries",), "optimizer.warmup_epochs": ("optimizer.boundaries",),
    "optimizer.schedule": ("optimizer.boundaries", "optimizer.factors"), "train.epochs": (
        "optimizer.warmup_epochs", "optimizer.boundaries"),
    "optimizer.grad_accumulation_steps": ("train.batch_size",), "model.name": ("network",), "model.stem": ("network",)}
"""What a message may name in place of a field: what that is checked against."""

DIVERGED = ("training diverged at step ", "--config.optimizer.learning_rate")


def set_field(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        tree = tree[parent]
    tree[last] = value


changes = st.dictionaries(st.sampled_from(FIELDS), st.none(), min_size=1, max_size=4).flatmap(
    lambda chosen: st.fixed_dictionaries({field: st.one_of(USUAL.get(field, st.sampled_from(ODD_TEXTS)),
                                                           USUAL.get(field, st.sampled_from(ODD_TEXTS)), ANYTHING)
                                          for field in chosen}))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a directory of 24 images of three classes."""
    return write_folder(tmp_path_factory.mktemp("folder") / "images", ("cat", "dog", "owl"), count=8)


def bounded(config: Config) -> bool:
    """Returns whether trying it is a matter of a moment."""
    return (config.data.image_size <= 32 and config.data.pad <= 64 and config.train.epochs <= 3
            and config.train.batch_size <= 64 and config.data.workers <= 0
            and config.optimizer.grad_accumulation_steps <= 8 and config.data.name in ("digits", "folder"))


def assert_names(message: str, changed: dict[str, Any]) -> None:
    """Asserts that `message` names a field that was changed, or what such a field is checked against."""
    words = [*changed, *(word for field in changed for word in RELATED.get(field, ()))]
    assert any(word in message for word in words), (message, changed)


@settings(THOROUGH, max_examples=150)
@given(changes)
@example({"orthogonality.weight": 10**400})
@example({"optimizer.boundaries": [-10**400]})
@example({"data.mean": np.zeros(2000)})
@example({"train.epochs": True})
def test_a_configuration_is_taken_or_refused_by_the_name_of_a_field(changed: dict[str, Any]) -> None:
    tree = to_dict(Config())
    for path, value in changed.items():
        set_field(tree, path, copy.copy(value))
    try:
        config = from_config_dict(tree)
    except UserError as error:
        assert_names(one_line(error), changed)
        return
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config
    kinds = {path: type(value) for path, value in config_module.flatten(to_dict(Config())).items()}
    assert {path: type(value) for path, value in config_module.flatten(to_dict(config)).items()} == kinds


@settings(THOROUGH, max_examples=12)
@given(changes)
@example({"data.std": [1e-7]})
@example({"data.mean": [1e300]})
@example({"data.std": [1.7e308]})
@example({"data.test_examples": 1, "data.validation": 0.5})
@example({"optimizer.boundaries": [5e-324], "optimizer.factors": [1e300]})
@example({"optimizer.warmup_epochs": 5e-324})
@example({"optimizer.learning_rate": 1e30})
@example({"train.epochs": 2**31 - 1})
@example({"train.epochs": 2**31 - 1, "data.placement": "stream"})
@example({"train.epochs": 2**31 - 1, "optimizer.schedule": "cosine"})
@example({"train.eval_batch_size": 2**31 - 1})
@example({"name": "\x00"})
@example({"data.name": "folder", "data.directory": "\x00"})
@example({"data.name": "folder", "data.directory": "two\nlines"})
@example({"data.name": "folder", "data.test": 5e-324})
@pytest.mark.slow
def test_a_configuration_trains_or_is_refused_by_the_name_of_a_field(images: Path, changed: dict[str, Any]) -> None:
    tree = to_dict(Config())
    for path, value in SMALL.items():
        set_field(tree, path, value)
    changed = {"data.directory": str(images), **changed} if changed.get("data.name") == "folder" else changed
    for path, value in changed.items():
        set_field(tree, path, copy.copy(value))
    try:
        config = from_config_dict(tree)
    except UserError as error:
        assert_names(one_line(error), changed)
        return
    endless = config.train.epochs > 3
    if not (bounded(config) or (endless and bounded(config_module.replace(config, {
            "train.epochs": 3, "optimizer.warmup_epochs": 0.0, "optimizer.boundaries": (), "optimizer.factors": ()})))):
        return
    with tempfile.TemporaryDirectory() as scratch:
        reporter = Watcher(at=[1] if endless else [])
        try:
            result = train(config, Path(scratch) / "runs" / config.name, reporter)
        except UserError as error:
            message = one_line(error)
            if not all(part in message for part in DIVERGED):
                assert_names(message, {**changed, **dict.fromkeys(SMALL)} if "data.name" in changed else changed)
            return
        except Interrupted:
            assert endless
            return
        assert reporter.steps
        assert all(math.isfinite(value) for value in result.values() if isinstance(value, float))


# Networks

PARTS = ("s0", "s1", "s4", "s16", "s999999", "s1000000", "s01", "u0", "u1", "u4", "u16", "-double", "-shared",
         "-shared++", "-tied", "-template1", "-template9999", "-template0", "-", "--", "+", "double", " ", "\n", "S8",
         "١", "𝟏", "²", "s", "u", "\x00", "0")

network_names = st.builds(
    lambda base, dash, parts: base + dash + "".join(parts),
    st.sampled_from((*FAMILIES, "resnet57", "", "resnet", "ResNet20", "resnet２０")), st.sampled_from(("", "-", "-")),
    st.lists(st.sampled_from(PARTS), max_size=4))

likely_names = st.builds(
    lambda base, s, u, double: f"{base}-s{s}u{u}{double}", st.sampled_from(tuple(FAMILIES)),
    st.one_of(st.integers(0, 16), st.integers(0, 2000)), st.one_of(st.integers(0, 8), st.integers(0, 2000)),
    st.sampled_from(("", "-double")))


def mutated(name: str, at: int, what: str, how: int) -> str:
    at %= len(name) + 1
    return (name[:at] + what + name[at:], name[:at] + name[at + 1:], name[:at] + what + name[at + 1:])[how]


names = st.one_of(network_names, likely_names, st.builds(
    mutated, st.one_of(network_names, likely_names), st.integers(0, 30), st.text(string.printable + "é²٣", max_size=2),
    st.integers(0, 2)), st.text(max_size=10))


@settings(THOROUGH, max_examples=8)
@given(names, st.sampled_from(("cifar", "imagenet", None)), st.sampled_from((8, 32, 33)), st.integers(2, 12))
@example("resnet14-s0u0", "cifar", 8, 10)
@example("mobilenetv2-shared", "imagenet", 8, 10)
@example("densenet121-s1u1", "cifar", 8, 10)
@example("resnet14-template9999", "cifar", 8, 10)
@example("resnext50_32x4d-s4u0", "cifar", 8, 10)
def test_a_name_is_that_of_a_network_or_refused(name: str, stem: str | None, size: int, classes: int) -> None:
    try:
        model = create_model(name, num_classes=classes, stem=stem)
        variables = abstract_variables(model, (size, size, 3))
    except UserError as error:
        message = one_line(error)
        ranks = re.findall(r"\d+", name.partition("-")[2])
        assert repr(name) in message or any(rank in message for rank in ranks) or "group" in message, message
        return
    assert re.fullmatch(r"\w+(-(s\d+u\d+(-double)?|shared|shared\+\+|tied|template\d+))?", name, re.ASCII)
    assert variables["params"]["head"]["kernel"].shape[1] == classes
    bases = {(group, array) for group, arrays in variables["params"].get("bases", {}).items() for array in arrays}
    named = {(path[1], path[2]) for elements in model.basis_groups("shared") for path in elements.shared}
    assert named == (bases if model.sharing.orthonormal else set())


# Command lines

RECIPES = tuple(sorted(path.name for path in (ROOT / "configs").glob("*.py") if path.name != "__init__.py"))

typed = st.one_of(st.sampled_from([str(number) for number in ODD_NUMBERS if abs(number) < 1e300 or number != number]),
                  st.sampled_from([text for text in ODD_TEXTS if "\x00" not in text]),
                  st.text(string.printable, max_size=6), st.sampled_from((
                      "(1,2)", "(0.5,)", "[1]", "{}", "'a'", "()", "1e", "0x10", "1_000", "1,2", "true", "None")))

arguments = st.one_of(
    st.builds("--config.{}={}".format, st.sampled_from(FIELDS), typed),
    st.builds(lambda field, at, what, how, value: f"--config.{mutated(field, at, what, how)}={value}",
              st.sampled_from(FIELDS), st.integers(0, 30), st.sampled_from(("e", ".", "_", "", "=")),
              st.integers(0, 2), typed),
    st.builds("--{}={}".format, st.sampled_from(("config", "workdir", "checkpoint", "mode", "json", "processes",
                                                 "process", "debug_nans", "distribute")), typed),
    st.builds("--config={}:{}".format, st.sampled_from([str(ROOT / "configs" / name) for name in RECIPES]),
              st.one_of(names.filter(lambda name: "\x00" not in name), st.just("resnet20"))),
    st.builds("--config.model.name={}".format, names.filter(lambda name: "\x00" not in name)),
    st.sampled_from(("--json", "--nojson", "--debug_nans", "-", "--", "train", "--config", "--config.train",
                     "--config.", "--config.=", "--undefok=x", "--config.model.name", "--=", "-json")),
    typed.filter(lambda text: "help" not in text))


@settings(THOROUGH, max_examples=100)
@given(commands=st.lists(arguments, max_size=3))
@example(commands=["--config.data.name=two\nlines"])
@example(commands=["--config.data.directory=\udcff"])
@example(commands=["--workdir=two\nlines"])
@example(commands=["--config=two\nlines.py"])
@example(commands=["--config.orthogonality.weight=1" + "0" * 400])
@example(commands=["--config.seed=1" + "0" * 5000])
@example(commands=["--workdir=" + "x" * 300])
@example(commands=["two\nlines"])
@example(commands=["--two\nlines=3"])
@example(commands=["--mode=two\nlines"])
def test_a_command_line_is_understood_or_refused_in_one_line(commands: list[str]) -> None:
    try:
        values, _ = parse(["main.py", *commands])
        config = from_config_dict(values.config)
        create_model(config.model.name, stem=config.model.stem)
    except UserError as error:
        one_line(error)
    else:
        assert values.mode in MODES


TRAINING = ("--config.train.epochs=1", "--config.data.train_examples=16", "--config.data.test_examples=4",
            "--config.train.batch_size=8", "--config.optimizer.warmup_epochs=0.0", "--config.data.workers=0",
            "--config.model.name=resnet14")


@pytest.mark.parametrize("commands", [
    ["--config.name=\udcff"], ["--config.data.std=(1e300,)"],
    pytest.param(["--config.model.dtype=bfloat16", "--json"], marks=pytest.mark.slow)], ids=ascii)
def test_an_odd_command_trains_or_is_refused_in_one_line(main: CommandLine, tmp_path: Path,
                                                         commands: list[str]) -> None:
    done = main(*TRAINING, *commands, cwd=tmp_path)
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode in (0, 2), done
    if done.returncode == 2:
        assert re.fullmatch(r"error: [^\n\r]+\n", done.stderr), done.stderr
        one_line(UserError(done.stderr.rstrip("\n")))
