"""The recipes of configs/: what they hold, and that their docstrings say how to run them."""

import importlib.util
from pathlib import Path

import pytest

from shared_basis.config import Config, flatten, from_config_dict, to_dict
from shared_basis.models import create_model
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
    "finetune": ("resnet20-s16u1-double", "resnet34", "densenet121-s64u4", "mobilenetv2-shared"),
    "imagenet": ("resnet34-s48u1-double", "resnet50-shared", "resnet101-shared++", "mobilenetv2"),
    "compact": ("mobilenetv1-s64u4", "shufflenetv1_g3-shared++", "shufflenetv2_x1_0-s16u1-double", "mobilenetv2-s8u1",
                "efficientnet_b0-shared++"),
}


def test_every_recipe_is_tested():
    assert {path.stem for path in FILES} == set(VARIANTS)


@pytest.mark.parametrize(("name", "variant"), [
    (name, variant) for name, variants in VARIANTS.items() for variant in (None, *variants)])
def test_a_recipe_takes_its_networks_and_names_the_run_after_them(name, variant):
    get_config = load(CONFIGS / f"{name}.py").get_config
    recipe = get_config(variant) if variant else get_config()
    if recipe.data.name == "folder":
        recipe.data.directory = "images"
    config = from_config_dict(recipe)
    if variant:
        assert config.model.name == variant
    assert config.name == f"{name}-{config.model.name}"
    create_model(config.model.name, stem=config.model.stem)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_docstring_holds_the_command_for_the_default_network_first(path):
    module = load(path)
    default = module.get_config().model.name
    indented = [line.strip() for line in module.__doc__.splitlines() if line.startswith("    ")]
    embedded = "python main.py" if path.stem == "digits_resnet" else None
    command, *images = indented[0].split(" --config.data.directory=")
    assert command == (embedded or f"python main.py --config=configs/{path.name}:{default}")
    assert bool(images) == (module.get_config().data.name == "folder")


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


def agrees(found, published):
    """Asserts that `found` holds what is `published`, and in all other fields, later ones too, the defaults."""
    fields, defaults = flatten(found), flatten(to_dict(Config()))
    assert {**defaults, **flatten(published)} == fields


def test_cifar_resnet_is_the_published_recipe():
    agrees(to_dict(from_config_dict(load(CONFIGS / "cifar_resnet.py").get_config("resnet32-s8u1"))), {
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
                      "boundaries": [150.0, 225.0], "factors": [0.1, 0.1], "warmup_epochs": 0.0},
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
    config = to_dict(from_config_dict(load(CONFIGS / f"{recipe}.py").get_config(variant)))
    train = {key: published[key] for key in ("epochs", "batch_size")}
    optimizer = {**STEPS, **{key: value for key, value in published.items() if key not in train}}
    orthogonality = {"method": "penalty", "weight": 10.0, "elements": "shared", "reduction": "mean"}
    cifar = {"name": "cifar100", "mean": [0.507, 0.487, 0.441], "std": [0.267, 0.256, 0.276], "pad": 4, "image_size": 0,
             "crop": "center"}
    imagenet = {"name": "imagenet2012", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "pad": 0,
                "image_size": 224, "crop": "random_resized"}
    agrees(config, {
        "name": f"{recipe}-{variant}", "seed": 0, "orthogonality": orthogonality, "optimizer": optimizer,
        "train": train, "data": {**ALL_IMAGES, **(cifar if recipe == "cifar100" else imagenet), "flip": True},
        "model": {"name": variant, "stem": "cifar" if recipe == "cifar100" else "imagenet", "dtype": "float32",
                  "scan_blocks": "auto"}})
