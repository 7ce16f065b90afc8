"""The recipes of configs/: what they hold, and that their docstrings say how to run them."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from shared_basis.config import Config, flatten, from_config_dict, replace, to_dict
from shared_basis.errors import UserError
from shared_basis.models import create_model
from shared_basis.optim.optimizer import learning_rate_schedule
from studies.published import PUBLISHED

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.py"))


def load(path):
    """Imports the configuration file at `path`."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VARIANTS = {
    "digits_resnet": ("resnet14", "resnet32-s8u1", "resnet56-s16u1-double"),
    "cifar_resnet": ("resnet20", "resnet110", "resnet32-s0u16", "resnet56-s16u1-double", "resnet20-tied"),
    "cifar100": ("resnet18", "resnet34-s16u0", "densenet121-s64u4", "resnext50_32x4d-s64u4", "mobilenetv2-shared++"),
    "finetune": ("resnet20-s16u1-double", "resnet32w12", "resnet34", "densenet121-s64u4", "mobilenetv2-shared"),
    "imagenet": ("resnet34-s48u1-double", "resnet50-shared", "resnet101-shared++", "mobilenetv2"),
    "compact": ("mobilenetv1-s64u4", "shufflenetv1_g3-shared++", "shufflenetv2_x1_0-s16u1-double", "mobilenetv2-s8u1",
                "efficientnet_b0-shared++"),
    "folder": ("resnet14", "resnet32w12-s8u1", "resnet18", "resnet34-s32u1", "densenet121-s64u4", "mobilenetv2-shared",
               "resnext50_32x4d"),
}


def get(name, variant=None, **fields):
    """Returns the recipe's configuration as the command line makes it; a folder's, of one that is named."""
    tree = load(CONFIGS / f"{name}.py").get_config(*([variant] if variant else []))
    if tree.data.name == "folder":
        tree.data.directory = "/path/folder"
    tree.update_from_flattened_dict(fields)
    return from_config_dict(tree)


def test_every_recipe_is_tested():
    assert {path.stem for path in FILES} == set(VARIANTS)


@pytest.mark.parametrize(("name", "variant"), [
    (name, variant) for name, variants in VARIANTS.items() for variant in (None, *variants)])
def test_a_recipe_takes_its_networks_and_names_the_run_after_them(name, variant):
    config = get(name, variant)
    if variant:
        assert config.model.name == variant
    assert config.name == f"{'folder-finetuned' if name == 'finetune' else name}-{config.model.name}"
    create_model(config.model.name, stem=config.model.stem)


@pytest.mark.parametrize("epochs", [1, 2, 30, 1000])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_number_of_epochs_alone_makes_a_run_of_another_length(name, epochs):
    whole = get(name)
    in_epochs = whole.train.freeze_epochs, whole.optimizer.warmup_epochs
    if max(in_epochs) >= epochs:
        with pytest.raises(UserError, match=rf"(warmup|freeze)_epochs=.*: must be below train\.epochs={epochs}"):
            get(name, **{"train.epochs": epochs})
        return
    other = get(name, **{"train.epochs": epochs})
    for one, another in zip(whole.optimizer.boundary_epochs(whole.train.epochs),
                            other.optimizer.boundary_epochs(epochs), strict=True):
        assert another / epochs == pytest.approx(one / whole.train.epochs)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_docstring_holds_the_command_for_the_default_network_first(path):
    module = load(path)
    default = module.get_config().model.name
    indented = [line.strip() for line in module.__doc__.splitlines() if line.startswith("    ")]
    command = f"python main.py --config=configs/{path.name}:{default}"
    others = {"digits_resnet": "python main.py", "folder": f"{command} --images=DIR",
              "finetune": f"{command} --images=DIR --init=RUN"}
    assert indented[0] == others.get(path.stem, command)


@pytest.mark.parametrize("row", PUBLISHED, ids=str)
def test_the_docstring_of_the_recipe_holds_the_published_error(row):
    recipe = {"CIFAR-10": "cifar_resnet", "CIFAR-100": "cifar100", "ImageNet": "imagenet"}[row.dataset]
    module = load(CONFIGS / f"{recipe}.py")
    assert row.error in module.__doc__
    assert from_config_dict(module.get_config(row.name)).model.name == row.name


ALL_IMAGES = {"directory": "", "manual_directory": "", "train_split": "", "test_split": "", "validation_split": "",
              "validation": 0.0, "test": 0.2, "split_seed": 0, "on_broken": "fail", "placement": "auto", "workers": -1,
              "train_examples": 0, "test_examples": 0}
"""The published networks were trained on all training images, and the best chosen on the test images."""


def assert_agrees(found, published):
    """Asserts that `found` holds what is `published`, and in all other fields, later ones too, the defaults."""
    fields, defaults = flatten(found), flatten(to_dict(Config()))
    assert {**defaults, **flatten(published)} == fields


def test_cifar_resnet_is_the_published_recipe():
    assert_agrees(to_dict(from_config_dict(load(CONFIGS / "cifar_resnet.py").get_config("resnet32-s8u1"))), {
        "name": "cifar_resnet-resnet32-s8u1",
        "seed": 0,
        "model": {"name": "resnet32-s8u1", "stem": "cifar", "dtype": "float32", "scan_blocks": "auto",
                  "norm_images": 0},
        "data": {**ALL_IMAGES, "name": "cifar10", "image_size": 0, "crop": "center", "mean": [0.485, 0.456, 0.406],
                 "std": [0.229, 0.224, 0.225], "pad": 4, "flip": True},
        "orthogonality": {"method": "penalty", "weight": 10.0, "elements": "shared+unique", "reduction": "mean"},
        "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "nesterov": False,
                      "grad_accumulation_steps": 1,
                      "weight_decay": 5e-4, "schedule": "piecewise",
                      "weight_decay_labels": ["basis", "coefficients", "kernel", "norm", "bias"],
                      "boundaries": [0.5, 0.75], "factors": [0.1, 0.1], "warmup_epochs": 0.0},
        "train": {"epochs": 300, "batch_size": 256, "eval_batch_size": 1000, "evaluate_every": 1,
                  "record_gradients": False},
    })


STEPS = {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "nesterov": False, "grad_accumulation_steps": 1,
         "schedule": "piecewise", "warmup_epochs": 0.0,
         "weight_decay_labels": ["basis", "coefficients", "kernel", "norm", "bias"]}
CIFAR = {"epochs": 300, "batch_size": 256, "boundaries": [150.0, 225.0], "factors": [0.1, 0.1], "weight_decay": 5e-4}
RESNETS = {"epochs": 150, "batch_size": 256, "boundaries": [60.0, 100.0, 140.0], "factors": [0.1, 0.1, 0.1],
           "weight_decay": 1e-4}
MOBILE = {"epochs": 300, "batch_size": 256, "boundaries": [150.0, 225.0, 285.0], "factors": [0.1, 0.1, 0.5],
          "weight_decay": 1e-5}


@pytest.mark.parametrize(("recipe", "variant", "published"), [
    *(("cifar100", variant, CIFAR) for variant in VARIANTS["cifar100"]),
    ("imagenet", "resnet18", RESNETS), ("imagenet", "resnet34-s32u1", RESNETS), ("imagenet", "resnet50", RESNETS),
    ("imagenet", "resnet101-shared", RESNETS), ("imagenet", "resnet50-shared", RESNETS | {"weight_decay": 4e-5}),
    *(("imagenet", f"mobilenetv2{sharing}", MOBILE) for sharing in ("", "-shared", "-shared++")),
])
def test_the_recipes_are_the_published_ones(recipe, variant, published):
    found = from_config_dict(load(CONFIGS / f"{recipe}.py").get_config(variant))
    config = to_dict(found)
    config["optimizer"]["boundaries"] = list(found.optimizer.boundary_epochs(found.train.epochs))  # as published
    train = {key: published[key] for key in ("epochs", "batch_size")}
    optimizer = {**STEPS, **{key: value for key, value in published.items() if key not in train}}
    orthogonality = {"method": "penalty", "weight": 10.0, "elements": "shared", "reduction": "mean"}
    cifar = {"name": "cifar100", "mean": [0.507, 0.487, 0.441], "std": [0.267, 0.256, 0.276], "pad": 4, "image_size": 0,
             "crop": "center"}
    imagenet = {"name": "imagenet2012", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "pad": 0,
                "image_size": 224, "crop": "random_resized"}
    assert_agrees(config, {
        "name": f"{recipe}-{variant}", "seed": 0, "orthogonality": orthogonality, "optimizer": optimizer,
        "train": train, "data": {**ALL_IMAGES, **(cifar if recipe == "cifar100" else imagenet), "flip": True},
        "model": {"name": variant, "stem": "cifar" if recipe == "cifar100" else "imagenet", "dtype": "float32",
                  "scan_blocks": "auto"}})


@pytest.mark.parametrize(("recipe", "variant", "published"), [
    ("cifar_resnet", "resnet20", CIFAR), ("cifar100", "resnet34-s32u1", CIFAR), ("imagenet", "resnet18", RESNETS),
    ("imagenet", "mobilenetv2", MOBILE)])
def test_the_schedule_in_parts_is_the_published_one_to_the_bit(recipe, variant, published):
    config = get(recipe, variant)
    epochs = replace(config, {"optimizer.boundaries": published["boundaries"]})
    for steps in (7, 195, 5004):
        rates = [np.asarray(learning_rate_schedule(one.optimizer, one.train.epochs, steps)(
            np.arange(one.train.epochs * steps, dtype=np.int32))) for one in (config, epochs)]
        np.testing.assert_array_equal(*rates)
        assert len(np.unique(rates[0])) == len(published["boundaries"]) + 1


def test_the_folder_recipe_sees_photographs_as_its_networks_want_them():
    for variant, stem, size, crop in (("resnet20-s8u1", "cifar", 32, "center"), ("resnet34", "imagenet", 224,
                                                                                 "random_resized")):
        config = get("folder", variant)
        assert (config.model.stem, config.data.image_size, config.data.crop) == (stem, size, crop)
        assert config.data.flip
        assert (config.data.mean, config.data.std, config.train.batch_size, config.data.validation) == ((), (), 0, -1)
