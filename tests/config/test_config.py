"""Configuration: conversion, what is refused and in which words."""

import dataclasses
import json
import re

import pytest
from ml_collections import ConfigDict

from shared_basis.config import (
    Config,
    DataConfig,
    DistillationConfig,
    ModelConfig,
    OptimizerConfig,
    OrthogonalityConfig,
    TrainConfig,
    check_field,
    differences,
    flatten,
    from_config_dict,
    replace,
    split,
    split_factors,
    to_config_dict,
    to_dict,
)
from shared_basis.errors import UserError

OTHER = Config(
    name="other", seed=7,
    model=ModelConfig(name="resnet14", dtype="bfloat16"),
    data=DataConfig(name="folder", directory="/images", validation=0.1, test=0.3, split_seed=5, image_size=32,
                    crop="random_resized", on_broken="skip", placement="stream", workers=2, train_examples=10,
                    mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), pad=4, flip=True),
    orthogonality=OrthogonalityConfig(weight=0.0, elements="shared+unique", reduction="sum"),
    optimizer=OptimizerConfig(learning_rate=0.2, nesterov=True, weight_decay_labels=("kernel", "basis"),
                              boundaries=(1.5, 2.0), factors=(0.1, 0.5), warmup_epochs=0.5),
    train=TrainConfig(epochs=3, batch_size=8))
"""A configuration in which most fields differ from their defaults."""


def error(tree):
    """Returns the message with which `tree` is refused, one line."""
    with pytest.raises(UserError) as caught:
        from_config_dict(tree)
    message = str(caught.value)
    assert "\n" not in message
    return message


def nested(path, value):
    """Returns nested dicts that hold `value` at the dotted `path`."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


WHOLE = "0 or a positive whole number"
NUMBER = "0 or a positive number"
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("path", "value", "words"), [
    ("name", "", "name='': must be a directory name"),
    ("name", "a/b", "name='a/b': must be a directory name"),
    ("name", "a\\b", "must be a directory name"),
    ("name", ".a", "name='.a': must be a directory name that does not begin with a dot"),
    ("seed", -1, "seed=-1: must be at least 0 and below 2^31"),
    ("seed", 2**31, "seed=2147483648: must be at least 0 and below 2^31"),
    ("model.stem", "cifarr", "model.stem='cifarr': must be one of cifar, imagenet. Did you mean 'cifar'?"),
    ("model.norm_images", -1, "model.norm_images=-1: must be 0 or a positive whole number that divides "
     "train.batch_size."),
    ("model.norm_images", 48, "model.norm_images=48: must be 0, or divide train.batch_size=256."),
    ("model.scan_blocks", "maybe", "model.scan_blocks='maybe': must be one of auto, yes, no."),
    ("model.dtype", "float16", "model.dtype='float16': must be one of float32, bfloat16. Did you mean 'bfloat16'?"),
    ("data.name", "cifar", "fashion_mnist, imagenet2012, tfds:<name>. Did you mean 'cifar10'?"),
    ("data.name", "zzz", "data.name='zzz': must be one of digits, folder, cifar10, cifar100, fashion_mnist,"),
    ("data.name", "tfds:", "data.name='tfds:': must be followed by a name, as in 'tfds:cifar10'"),
    ("data.name", "folder", "data.directory='': must be the directory of images when data.name='folder'"),
    ("data.train_split", "train[:90%]", "data.train_split='train[:90%]': data.name='digits' ignores this field, which "
                                        "only applies to TFDS; omit it."),
    ("data.directory", "/images", "data.directory='/images': data.name='digits' ignores this field; omit it. To "
                                  "train on a folder of images, give --images=DIR"),
    ("data.test", 0.5, "data.test=0.5: data.name='digits' ignores this field; omit it."),
    ("data", {"name": "tfds:mnist", "test": 0.5}, "data.test=0.5: data.name='tfds:mnist' ignores this field"),
    ("data", {"name": "folder", "directory": "/images", "manual_directory": "/x"},
     "data.manual_directory='/x': data.name='folder' ignores this field"),
    ("data", {"name": "folder", "directory": "/images", "validation_split": "validation"},
     "data.validation_split='validation': data.name='folder' ignores this field"),
    ("data.validation", -0.1, "data.validation=-0.1: must be at least 0 and below 1"),
    ("data.validation", 1.0, "data.validation=1.0: must be at least 0 and below 1"),
    ("data.validation", NAN, "data.validation=nan: must be at least 0 and below 1"),
    ("data", {"name": "cifar10", "validation": 0.1, "validation_split": "test[:10%]"},
     "data.validation=0.1: must be 0 when data.validation_split='test[:10%]'"),
    ("data.test", 0.0, "data.test=0.0: must be above 0 and at most 1"),
    ("data.test", 1.1, "data.test=1.1: must be above 0 and at most 1"),
    ("data.test", NAN, "data.test=nan: must be above 0 and at most 1"),
    ("data.split_seed", -1, f"data.split_seed=-1: must be {WHOLE}"),
    ("data.crop", "centre", "data.crop='centre': must be one of center, random_resized. Did you mean 'center'?"),
    ("data.crop", "random_resized",
     "data.image_size=0: must be positive when data.crop='random_resized'; 224 is usual"),
    ("data", {"crop": "random_resized", "image_size": 224, "placement": "device"},
     "data.placement='device': must be auto or stream when data.crop='random_resized'"),
    ("data.on_broken", "skipp", "data.on_broken='skipp': must be one of fail, skip. Did you mean 'skip'?"),
    ("data.placement", "devices",
     "data.placement='devices': must be one of auto, device, stream. Did you mean 'device'?"),
    ("data.workers", -2, "data.workers=-2: must be -1, or 0 to 512"),
    ("data.workers", 513, "data.workers=513: must be -1, or 0 to 512"),
    ("data.image_size", -1, f"data.image_size=-1: must be {WHOLE}"),
    ("data.image_size", 16385, "data.image_size=16385: must be at most 16384 pixels"),
    ("data.train_examples", -2, f"data.train_examples=-2: must be {WHOLE}"),
    ("data.test_examples", -3, f"data.test_examples=-3: must be {WHOLE}"),
    ("data.pad", -4, f"data.pad=-4: must be {WHOLE}"),
    ("data.mean", (), "data.std=(0.5,): must be empty when data.mean=()"),
    ("data.std", (), "data.std=(): must be given when data.mean=(0.5,)"),
    ("data.mean", (0.1, 0.2), "data.mean=(0.1, 0.2): must be one value, or one for each of three channels"),
    ("data.mean", (NAN,), "data.mean=(nan,): must be numbers up to 1e30"),
    ("data.std", (0.1, 0.2), "data.std=(0.1, 0.2): must be one value, or one for each of three channels"),
    ("data.std", (INF,), "data.std=(inf,): must be numbers up to 1e30"),
    ("data.std", (1.0, 0.0, 1.0), "data.std=(1.0, 0.0, 1.0): must be positive"),
    ("orthogonality.weight", -0.5, f"orthogonality.weight=-0.5: must be {NUMBER}"),
    ("orthogonality.weight", INF, f"orthogonality.weight=inf: must be {NUMBER}"),
    ("orthogonality.elements", "unique", "must be one of shared, shared+unique. Did you mean"),
    ("orthogonality.reduction", "men", "orthogonality.reduction='men': must be one of mean, sum. Did you mean 'mean'?"),
    ("optimizer.learning_rate", -0.1, f"optimizer.learning_rate=-0.1: must be {NUMBER}"),
    ("optimizer.learning_rate", NAN, f"optimizer.learning_rate=nan: must be {NUMBER}"),
    ("optimizer.weight_decay", -1e-4, f"optimizer.weight_decay=-0.0001: must be {NUMBER}"),
    ("optimizer.warmup_epochs", -1.0, f"optimizer.warmup_epochs=-1.0: must be {NUMBER}"),
    ("optimizer.warmup_epochs", 300.0, "optimizer.warmup_epochs=300.0: must be below train.epochs=300"),
    ("optimizer.momentum", 1.0, "optimizer.momentum=1.0: must be at least 0 and below 1"),
    ("optimizer.momentum", -0.1, "optimizer.momentum=-0.1: must be at least 0 and below 1"),
    ("optimizer.momentum", NAN, "optimizer.momentum=nan: must be at least 0 and below 1"),
    ("optimizer.weight_decay_labels", ("kernels",),
     "optimizer.weight_decay_labels='kernels': must be one of basis, coefficients, kernel, norm, "
                                      "bias. Did you mean 'kernel'?"),
    ("optimizer.schedule", "cosin", "must be one of piecewise, cosine. Did you mean 'cosine'?"),
    ("optimizer.boundaries", (5.0,), "optimizer.factors=(): must be as many as optimizer.boundaries=(5.0,)"),
    ("optimizer.factors", (0.1,), "optimizer.factors=(0.1,): must be as many as optimizer.boundaries=()"),
    ("optimizer", {"boundaries": (5, 5), "factors": (1, 1)}, "(5.0, 5.0): must be increasing and above 0"),
    ("optimizer", {"boundaries": (NAN,), "factors": (0.1,)}, "optimizer.boundaries=(nan,): must be increasing"),
    ("optimizer", {"boundaries": (2,), "factors": (0.1,), "warmup_epochs": 2.5}, "after the warm-up of 2.5"),
    ("optimizer", {"boundaries": (2,), "factors": (0,)}, "optimizer.factors=(0.0,): must be positive"),
    ("optimizer", {"boundaries": (2,), "factors": (INF,)}, "optimizer.factors=(inf,): must be positive"),
    ("optimizer", {"boundaries": (300,), "factors": (0.1,)},
     "below train.epochs=300, or fractions of the run, all below 1, e.g. (0.5,0.75), which fit any number of epochs"),
    ("optimizer", {"boundaries": (0, 0.5), "factors": (1, 1)}, "(0.0, 0.5): must be increasing and above 0"),
    ("optimizer", {"boundaries": (0.01,), "factors": (0.1,), "warmup_epochs": 3.0},
     "optimizer.boundaries=(0.01,): must be after the warm-up of 3 epochs; with train.epochs=300 the first is at 3"),
    ("optimizer", {"schedule": "cosine", "boundaries": (5,), "factors": (0.1,)},
     "optimizer.boundaries=(5.0,): must be empty when optimizer.schedule='cosine'"),
    ("optimizer", {"schedule": "cosine", "factors": (0.1,)},
     "optimizer.factors=(0.1,): must be empty when optimizer.schedule='cosine'"),
    ("train.epochs", 0, "train.epochs=0: must be a positive whole number"),
    ("train.batch_size", -1, "train.batch_size=-1: must be a positive whole number below 2^31, or 0"),
    ("train.eval_batch_size", -1, "train.eval_batch_size=-1: must be a positive whole number"),
    ("train.evaluate_every", 0, "train.evaluate_every=0: must be a positive whole number"),
    ("optimizer.name", "adam", "optimizer.name='adam': must be one of sgd, adamw, lion, muon. Did you mean 'adamw'?"),
    ("optimizer", {"name": "lion", "nesterov": True}, "optimizer.nesterov=True: must be False when "
                                                      "optimizer.name='lion'"),
    *(("optimizer.learning_rate_factors", entry, f"optimizer.learning_rate_factors={entry!r}: must be WHAT=FACTOR: a "
       "kind of parameters or a glob of paths, and a number of at least 0, e.g. head/**=10")
      for entry in ("head", "head=", "=2", "head=-1", "head=nan", "head=ten")),
    ("train.freeze", "!", "train.freeze='!': must be a kind of parameters or a glob of paths, such as norm, group1/** "
                          "or !head/**"),
    ("train.freeze_epochs", -1.0, f"train.freeze_epochs=-1.0: must be {NUMBER}"),
    ("train", {"freeze": "norm", "freeze_epochs": 300.0}, "train.freeze_epochs=300.0: must be below train.epochs=300"),
    ("train.label_smoothing", 1.0, "train.label_smoothing=1.0: must be at least 0 and below 1"),
    ("train.mixup", -0.2, f"train.mixup=-0.2: must be {NUMBER}"),
    ("train.cutmix", NAN, f"train.cutmix=nan: must be {NUMBER}"),
    ("train.ema_decay", 1.0, "train.ema_decay=1.0: must be at least 0 and below 1"),
    ("train.freeze_statistics", 1, "train.freeze_statistics=1: must be of type bool"),
    ("distillation.teacher", 3, "distillation.teacher=3: must be of type str"),
    ("distillation.weight", 0.0, "distillation.weight=0.0: must be above 0 and at most 1"),
    ("distillation.weight", 1.5, "distillation.weight=1.5: must be above 0 and at most 1"),
    ("distillation.temperature", 0.0, "distillation.temperature=0.0: must be 0.01 to 1000"),
])
def test_a_value_that_is_not_allowed_is_told_with_what_is(path, value, words):
    assert words in error(nested(path, value))


@pytest.mark.parametrize("part", [
    Config, ModelConfig, DataConfig, OrthogonalityConfig, OptimizerConfig, TrainConfig, DistillationConfig])
def test_every_part_is_valid_by_default_and_frozen(part):
    field = dataclasses.fields(part)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(part(), field, None)


@pytest.mark.parametrize("fields", [
    {"name": "tfds:mnist"}, {"name": "tfds:emnist/letters", "train_split": "train[:90%]", "test_split": "train[90%:]"},
    {"image_size": 32}, {"image_size": 32, "crop": "random_resized", "placement": "stream"},
    {"validation": 0.999}, {"name": "folder", "directory": "x", "test": 1.0}, {"workers": 0}, {"workers": 512},
    {"split_seed": 2**31 - 1}], ids=str)
def test_values_at_the_limits_are_taken(fields):
    data = from_config_dict({"data": fields}).data
    assert {name: getattr(data, name) for name in fields} == fields


def test_values_are_checked_when_a_part_is_built_by_hand():
    with pytest.raises(UserError, match=re.escape("train.epochs=0: must be a positive whole number below 2^31.")):
        TrainConfig(epochs=0)


@pytest.mark.parametrize(("tree", "unknown", "nearest"), [
    ({"seeds": 1}, "seeds", "seed"),
    ({"train": {"epoch": 1}}, "train.epoch", "train.epochs"),
    ({"optimizer": {"lerning_rate": 1}}, "optimizer.lerning_rate", "optimizer.learning_rate"),
])
def test_an_unknown_field_is_refused_with_the_nearest(tree, unknown, nearest):
    message = error(tree)
    section = unknown.rpartition(".")[0]
    assert message.startswith(f"unknown configuration field '{unknown}'. Did you mean '{nearest}'? The fields "
                              f"{f'of {section} ' if section else ''}are: ")


def test_an_unknown_field_like_no_other_is_refused_with_all_fields():
    message = error({"xyzzy": 1})
    fields = sorted(field.name for field in dataclasses.fields(Config))
    assert message == f"unknown configuration field 'xyzzy'. The fields are: {', '.join(fields)}."


def test_the_section_of_an_unknown_field_is_taken_at_its_word():
    def message(path):
        with pytest.raises(UserError) as caught:
            check_field(path)
        return str(caught.value)
    # As a whole "lamda" is nearest to "pad", which has nothing to do with it.
    assert message("orthogonality.lamda") == (
        "unknown configuration field 'orthogonality.lamda'. The fields of orthogonality are: " + ", ".join(
            f"orthogonality.{field.name}" for field in sorted(
                dataclasses.fields(OrthogonalityConfig), key=lambda field: field.name)) + ".")
    assert "Did you mean 'orthogonality.weight'? The fields of" in message("orthogonality.wieght")
    assert "Did you mean 'optimizer.weight_decay'? The fields of train are" in message("train.weight_decay")
    assert "Did you mean 'orthogonality.weight'? The fields are: data." in message("orthogonalty.weight")
    assert "Did you mean 'optimizer.learning_rate'? The fields are" in message("optimiser.lr")
    assert message("data.num_classes").startswith(
        "unknown configuration field 'data.num_classes'. The classes are those of the images, a directory for each. "
        "The fields of data are: ")
    assert "Did you mean 'distillation.weight'? The fields are: data." in message("distilation.weight")


def test_a_value_in_the_place_of_a_part_is_refused():
    assert error({"model": "resnet20"}) == "model='resnet20': must hold the fields of ModelConfig."


@pytest.mark.parametrize("config", [Config(), OTHER], ids=["default", "other"])
def test_round_trips_give_an_equal_configuration(config):
    assert from_config_dict(to_config_dict(config)) == config
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_a_config_dict_refuses_a_value_of_another_type():
    tree = to_config_dict(Config())
    assert isinstance(tree, ConfigDict)
    with pytest.raises(TypeError):
        tree.train.epochs = "many"


def test_absent_fields_take_their_defaults():
    assert from_config_dict({}) == Config()
    assert from_config_dict({"train": {"epochs": 5}}) == Config(train=TrainConfig(epochs=5))


@pytest.mark.parametrize("value", ["kernel,basis", " kernel , basis,", ("kernel", "basis"), ["kernel,basis"]])
def test_a_tuple_of_strings_may_come_as_one_from_the_command_line(value):
    config = from_config_dict({"optimizer": {"weight_decay_labels": value}})
    assert config.optimizer.weight_decay_labels == ("kernel", "basis")


def test_patterns_are_separated_by_commas():
    config = from_config_dict({"train": {"freeze": "**, !head/**"},
                               "optimizer": {"learning_rate_factors": "basis=0.5,head/**=10"}})
    assert split(config.train.freeze) == ("**", "!head/**")
    assert split_factors(config.optimizer.learning_rate_factors) == [("basis", 0.5), ("head/**", 10.0)]


def test_an_empty_string_is_an_empty_tuple():
    assert from_config_dict({"optimizer": {"weight_decay_labels": ""}}).optimizer.weight_decay_labels == ()


def test_a_whole_number_is_taken_for_a_float():
    config = from_config_dict({"optimizer": {"learning_rate": 1, "boundaries": [3, 4.5], "factors": (1, 2)}})
    values = (config.optimizer.learning_rate, *config.optimizer.boundaries, *config.optimizer.factors)
    assert values == (1.0, 3.0, 4.5, 1.0, 2.0)
    assert {type(value) for value in values} == {float}


@pytest.mark.parametrize(("path", "value", "kind"), [
    ("seed", True, "int"), ("seed", 1.0, "int"), ("seed", "1", "int"), ("optimizer.learning_rate", True, "float"),
    ("optimizer.learning_rate", "0.1", "float"), ("data.mean", (True,), "float"), ("data.flip", 1, "bool"),
    ("name", 3, "str"), ("name", None, "str"),
])
def test_a_value_of_another_type_is_refused(path, value, kind):
    shown = value[0] if isinstance(value, tuple) else value
    assert error(nested(path, value)) == f"{path}={shown!r}: must be of type {kind}."


def test_replace_sets_fields_by_path_and_checks_them():
    changed = replace(Config(), {"train.epochs": 3, "seed": 5, "optimizer.weight_decay_labels": "norm"})
    assert (changed.train.epochs, changed.seed, changed.optimizer.weight_decay_labels) == (3, 5, ("norm",))
    assert changed.train.batch_size == TrainConfig().batch_size
    with pytest.raises(UserError, match=r"train\.epochs=0: must be a positive"):
        replace(Config(), {"train.epochs": 0})


@pytest.mark.parametrize(("path", "nearest"), [("train.epoch", "train.epochs"), ("data.directry", "data.directory")])
def test_replace_refuses_an_unknown_path_with_the_nearest(path, nearest):
    with pytest.raises(UserError, match=re.escape(f"{path!r}. Did you mean {nearest!r}?")):
        replace(Config(), {path: 3})


@pytest.mark.parametrize("path", ["model", "train.epochs.x"])
def test_replace_refuses_a_path_that_is_no_leaf(path):
    with pytest.raises(UserError, match=f"unknown configuration field '{path}'"):
        replace(Config(), {path: 3})


def test_differences_name_the_fields_and_leave_out_locations():
    here = Config(data=DataConfig(name="cifar10", directory="/a", manual_directory="/b", pad=4), seed=1)
    there = Config(data=DataConfig(name="cifar10", directory="/c", manual_directory="/d", pad=2), seed=2)
    assert differences(here, there) == {"seed": (1, 2), "data.pad": (4, 2)}
    assert differences(here, Config(data=dataclasses.replace(here.data, directory="/e"), seed=1)) == {}
    elsewhere = dataclasses.replace(here.data, directory="/e", manual_directory="/f", placement="stream", workers=3)
    assert differences(here, Config(data=elsewhere, seed=1)) == {}
    assert differences(here, Config(data=elsewhere, seed=1), locations=True) == {
        "data.directory": ("/a", "/e"), "data.manual_directory": ("/b", "/f"), "data.placement": ("auto", "stream"),
        "data.workers": (-1, 3)}
    for field, value in (("crop", "random_resized"), ("on_broken", "skip"), ("validation", 0.1), ("split_seed", 1)):
        other = dataclasses.replace(here.data, image_size=32, **{field: value})
        assert f"data.{field}" in differences(here, Config(data=other, seed=1))


@pytest.mark.parametrize(("old", "new", "value"), [
    ({"model": {"loop": "no"}}, "model.scan_blocks", "no"), ({"optimizer": {"decay": ["norm"]}},
     "optimizer.weight_decay_labels", ["norm"]), ({"optimizer": {"accumulate": 4}},
     "optimizer.grad_accumulation_steps", 4)])
def test_the_fields_of_version_0_1_are_known_by_their_old_names(old, new, value):
    assert flatten(to_dict(from_config_dict(old)))[new] == value


@pytest.mark.parametrize(("boundaries", "epochs", "expected"), [
    ((0.5, 0.75), 300, (150.0, 225.0)), ((0.5, 0.75), 30, (15.0, 22.5)), ((100 / 150,), 150, (100.0,)),
    ((150.0, 225.0), 400, (150.0, 225.0)), ((0.5, 2.0), 4, (0.5, 2.0)), ((0.999,), 1, (0.999,)), ((), 10, ())])
def test_boundaries_below_1_are_parts_of_the_run(boundaries, epochs, expected):
    optimizer = OptimizerConfig(boundaries=boundaries, factors=(0.1,) * len(boundaries))
    assert optimizer.boundary_epochs(epochs) == expected


def test_boundaries_that_are_the_same_epochs_do_not_differ():
    parts = Config(optimizer=OptimizerConfig(boundaries=(0.5, 0.75), factors=(0.1, 0.1)))
    assert differences(parts, replace(parts, {"optimizer.boundaries": (150.0, 225.0)})) == {}
    assert differences(parts, replace(parts, {"train.epochs": 30})) == {"train.epochs": (300, 30)}
    assert set(differences(parts, replace(parts, {"train.epochs": 600, "optimizer.boundaries": (150.0, 225.0)}))) == {
        "train.epochs"}
    assert "optimizer.boundaries" in differences(parts, replace(parts, {"optimizer.boundaries": (0.4, 0.75)}))
