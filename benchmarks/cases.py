"""The cases of `benchmarks.speed`: networks with a batch, random images, and the trainer's own step."""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.trainer import BareStep, build
from shared_basis.config import Config, ModelConfig, from_config_dict, replace
from shared_basis.data.examples import Spec, Split
from shared_basis.data.feeds import Images
from shared_basis.models import create_model, plain_counterpart
from shared_basis.models.base import Network
from shared_basis.models.summary import compare_with_plain
from shared_basis.runs.trained import build_model
from shared_basis.runtime.distributed import check_batch_size, make_mesh

SECONDS = 1.5
"""Minimum duration of a measurement of steps, to hide the overhead of clocks and queues."""
MOST_STEPS = 1000
"""Maximum number of steps in a measurement, however short they are."""

NETWORKS = {
    "cpu": ("resnet32", "resnet32-s16u1-double", "resnet34", "resnet34-s32u1"),
    "accelerator": ("resnet56", "resnet56-s16u1-double", "resnet34", "resnet34-s32u1", "resnet50", "resnet50-shared",
                    "mobilenetv2", "mobilenetv2-shared"),
}
"""The default networks."""

_SMALL = ("resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
_LARGE_IMAGES = ("resnet50", "resnet101", "mobilenetv2")
_BATCHES = {
    "cpu": {"small": (64, 1000), "wide": (32, 200), "large": (8, 32)},
    "accelerator": {"small": (256, 1000), "wide": (256, 1000), "large": (64, 250)},
}
"""Images per step and per batch of an evaluation."""


@dataclasses.dataclass(frozen=True)
class Mode:
    """A mode of PyTorch, for `benchmarks.pytorch_trainer`."""

    channels_last: bool = False
    autocast: bool = False
    """Whether to use autocast to bfloat16."""
    compiled: bool = False


MODES = {
    "eager": Mode(),
    "channels_last": Mode(channels_last=True),
    "channels_last bf16": Mode(channels_last=True, autocast=True),
    "compiled": Mode(channels_last=True, compiled=True),
    "compiled bf16": Mode(channels_last=True, autocast=True, compiled=True),
}
"""The modes by name; all except the first use channels_last."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, its images, and its dtype."""

    network: str
    batch: int
    image_size: int = 32
    dtype: str = "float32"
    """Compute dtype of this package; for PyTorch it depends on the mode."""
    eval_batch: int = 1000

    @property
    def plain(self) -> str:
        """The network without sharing."""
        return plain_counterpart(self.network)

    @property
    def form(self) -> str:
        """The sharing in the network's name; empty for a plain network."""
        return self.network.partition("-")[2]

    @property
    def stem(self) -> str:
        """The stem for images of this size."""
        return "cifar" if self.image_size <= 64 else "imagenet"

    @property
    def classes(self) -> int:
        """Number of logits: classes of the data set for which the network is published."""
        return 1000 if self.stem == "imagenet" else 10 if self.plain in _SMALL else 100

    @property
    def elements(self) -> str:
        """The basis elements that the published penalty covers."""
        return "shared+unique" if self.classes == 10 else "shared"

    @property
    def recipe(self) -> str:
        """The configuration file of the published recipe."""
        return {10: "cifar_resnet", 100: "cifar100", 1000: "imagenet"}[self.classes]

    def config(self, **changes: Any) -> Config:
        """Returns the published recipe for one epoch; `changes` are configuration fields, with '__' instead of dots."""
        recipe = importlib.import_module(f"configs.{self.recipe}").get_config(self.network)
        config = replace(from_config_dict(recipe), {
            "model.stem": self.stem, "model.dtype": self.dtype,
            "data.crop": "center",  # random crops are made while reading, outside of the step
            "optimizer.boundaries": (), "optimizer.factors": (), "train.epochs": 1,
            "train.batch_size": self.batch, "train.eval_batch_size": self.eval_batch})
        return replace(config, {name.replace("__", "."): value for name, value in changes.items()})

    def counts(self) -> dict[str, float]:
        """Returns multiply-accumulates per image, parameters, and both relative to the plain network."""
        found = compare_with_plain(ModelConfig(name=self.network, stem=self.stem), self.classes,
                                   (self.image_size, self.image_size, 3))
        return {"macs": found["macs"], "parameters": found["parameters"],
                **{f"{key} over plain": found[key] / found["plain"][key] for key in ("macs", "parameters")}}


def make_case(network: str, platform: str, batch: int | None = None, dtype: str = "float32") -> Case:
    """Returns the case for `network` with its usual image size and the usual batch on `platform`.

    Raises:
      UserError: there is no such network.
    """
    create_model(network)
    base = plain_counterpart(network)
    kind = "small" if base in _SMALL else "large" if base in _LARGE_IMAGES else "wide"
    usual, scored = _BATCHES["cpu" if platform == "cpu" else "accelerator"][kind]
    return Case(network, batch or usual, 224 if kind == "large" else 32, dtype, batch or scored)


def default_networks(platform: str) -> tuple[str, ...]:
    """Returns the default networks on `platform`."""
    return NETWORKS["cpu" if platform == "cpu" else "accelerator"]


def beside_plain(cases: Iterable[Case]) -> list[list[Case]]:
    """Groups the cases by plain network, which is placed first in each list and added if missing."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        group = groups.setdefault(case.plain, [dataclasses.replace(case, network=case.plain)])
        if case.form and case not in group:
            group.append(case)
    return list(groups.values())


def random_images(case: Case, train: int, test: int, config: Config) -> Images:
    """Returns random images that will be resident on the device."""
    random, size = np.random.default_rng(0), case.image_size
    splits = {name: Split(random.integers(0, 256, (count, size, size, 3), dtype=np.uint8),
                          random.integers(0, case.classes, count).astype(np.int32))
              for name, count in (("train", train), ("test", test))}
    return Images(Spec((size, size, 3), tuple(map(str, range(case.classes)))), splits, config.data)


def make_step(case: Case, model: Network | None = None, test: int = 1, **changes: Any) -> BareStep:
    """Returns the trainer's compiled step for `case`, or for another `model`, on resident images.

    Args:
      test: the number of test images.
      changes: see `Case.config`.

    Raises:
      UserError: the batch does not divide evenly among the devices.
    """
    config, mesh = case.config(**changes), make_mesh()
    check_batch_size(case.batch, mesh)
    with tempfile.TemporaryDirectory() as root:
        images = random_images(case, 2 * case.batch, test, config)
        state, program = build(config, images, build_model(config, images.spec) if model is None else model, mesh,
                               Path(root))
    return BareStep(state, program, mesh)


class Timed:
    """Measures seconds per step over as many steps as take `seconds`, determined by the first call."""

    def __init__(self, run: Callable[[int], float], seconds: float = SECONDS) -> None:
        self._run, self._seconds = run, seconds
        self._steps = 0

    def __call__(self) -> float:
        """Returns the seconds per step."""
        if not self._steps:
            self._steps = min(MOST_STEPS, max(2, round(self._seconds / self._run(2))))
        return self._run(self._steps)


def repeated(function: Callable[[], object]) -> Callable[[int], float]:
    """Returns a function that calls the blocking `function` a given number of times and returns the seconds."""
    def run(times: int) -> float:
        function()
        began = time.perf_counter()
        for _ in range(times):
            function()
        return (time.perf_counter() - began) / times
    return run


def by_form(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Groups the cases by sharing, in order."""
    forms = dict.fromkeys(case.form for case in cases)
    return {form: [case for case in cases if case.form == form] for form in forms}
