"""The fields of a configuration, their defaults, and what values they allow."""

from __future__ import annotations

import dataclasses
import itertools

from shared_basis.config.checks import require as _require
from shared_basis.config.checks import require_choice as _require_choice
from shared_basis.config.checks import split
from shared_basis.config.data import DataConfig, named_after
from shared_basis.config.renamed import takes_old_names
from shared_basis.config.training import DistillationConfig, TrainConfig

PARAMETER_LABELS = ("basis", "coefficients", "kernel", "norm", "bias")
"""Kinds of parameters, which weight decay can be limited to: filter basis elements (shared and unique), coefficients,
ordinary kernels, scale and bias of batch normalisation, and biases of linear layers; see `optim.labels`."""


@takes_old_names("model")
@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network. `name` follows the naming grammar of `shared_basis.create_model`."""

    name: str = "resnet20-s16u1-double"
    """The network and its sharing: docs/networks.md."""
    stem: str = "cifar"
    """'cifar' for small images (3×3 stem); further stems belong to networks for large images."""
    dtype: str = "float32"
    """Compute type: 'float32' or 'bfloat16'. Parameters, batch statistics and penalty are float32 always."""
    scan_blocks: str = "auto"
    """Whether blocks that are alike are computed in a loop, which compiles sooner, and keeps less for the gradient and
    computes the rest again: 'yes', 'no' or 'auto', which is what is faster (on CPU yes; elsewhere no, not measured)."""
    norm_images: int = 0
    """Training only: batch normalisation takes its statistics over groups of so many images of the batch, as PyTorch's
    DataParallel does with each GPU's share, and its running ones are the groups' mean; 0 takes them over the whole
    batch. The result does not depend on the number of devices; groups within a device's share need no communication."""

    def __post_init__(self) -> None:
        _require(0 <= self.norm_images < 2**31, "model.norm_images", self.norm_images,
                 "0 or a positive whole number that divides train.batch_size")
        _require_choice("model.stem", self.stem, ("cifar", "imagenet"))
        _require_choice("model.dtype", self.dtype, ("float32", "bfloat16"))
        _require_choice("model.scan_blocks", self.scan_blocks, ("auto", "yes", "no"))


@dataclasses.dataclass(frozen=True)
class OrthogonalityConfig:
    """How filter bases are kept orthonormal: by default by the penalty of the paper (Kang & Kim, section 3.2)."""

    method: str = "penalty"
    """'penalty': the loss is cross entropy + weight · penalty. 'exact': bases are orthonormal after every step, weight
    and reduction have no effect, and weight decay leaves those bases alone. 'none': neither (the penalty is still
    reported)."""
    weight: float = 10.0
    """λ; 0 leaves the penalty out, as method 'none'."""
    elements: str = "shared"
    """Which basis elements count: 'shared' alone, or 'shared+unique' (CIFAR-10): unique ones with the shared ones, and
    with those of their own layer."""
    reduction: str = "mean"
    """'mean' over the pairs that count (published), or their 'sum', whose effect on an element does not depend on the
    ranks."""

    def __post_init__(self) -> None:
        _require(0 <= self.weight <= 1e30, "orthogonality.weight", self.weight,
                 "0 or a positive number, at most 1e30")
        _require_choice("orthogonality.method", self.method, ("penalty", "exact", "none"))
        _require_choice("orthogonality.elements", self.elements, ("shared", "shared+unique"))
        _require_choice("orthogonality.reduction", self.reduction, ("mean", "sum"))


@takes_old_names("optimizer")
@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, by default stochastic gradient descent with momentum; weight decay; the learning rate schedule."""

    name: str = "sgd"
    """'sgd' (published), 'adamw', 'lion' or 'muon', which are optax's. muon orthogonalises the updates of bases,
    coefficients and convolutions, and leaves the head, norms and biases to adamw."""
    learning_rate: float = 0.1
    """After warm-up, before the schedule lowers it."""
    learning_rate_factors: str = ""
    """Multiplies the learning rate of some parameters: WHAT=FACTOR, WHAT a kind (basis, coefficients, kernel, norm,
    bias) or a glob of paths, such as basis=0.1,head/**=10. Of several that match, the last one counts."""
    momentum: float = 0.9
    """Of sgd; the first decay rate of the others (b1, muon's beta)."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = 5e-4
    """sgd: L2 coefficient, added to the gradient before momentum (as in PyTorch). The others: decoupled, times the
    learning rate."""
    weight_decay_labels: tuple[str, ...] = PARAMETER_LABELS
    """The kinds of parameters that decay: any of basis, coefficients, kernel, norm, bias. Published: all."""
    schedule: str = "piecewise"
    """'piecewise' (constant, multiplied by `factors` after the epochs `boundaries`) or 'cosine' (to 0)."""
    boundaries: tuple[float, ...] = ()
    """Below 1 they are parts of the run: (0.5, 0.75) after half and after three quarters of its epochs, however many
    those are. If any is 1 or more, all are epochs (fractions allowed)."""
    factors: tuple[float, ...] = ()
    """What the learning rate is multiplied by at each of `boundaries`."""
    warmup_epochs: float = 0.0
    """Linear rise of the learning rate from 0, counted in epochs (fractions allowed)."""
    grad_accumulation_steps: int = 1
    """Parts that a batch is divided into, whose gradients are computed one after another and averaged: N parts take
    about 1/N of the memory for activations (on GPU and TPU). Everything else stays, learning rate and steps too, but
    batch normalisation and dropout see the parts: on networks with batch normalisation it is not the same training."""

    def __post_init__(self) -> None:
        _require(1 <= self.grad_accumulation_steps < 2**31, "optimizer.grad_accumulation_steps",
                 self.grad_accumulation_steps, "a positive whole number")
        for field, low in (("learning_rate", 0.0), ("weight_decay", 0.0), ("warmup_epochs", 0.0)):
            value = getattr(self, field)
            _require(low <= value <= 1e30, f"optimizer.{field}", value, "0 or a positive number, at most 1e30")
        _require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "at least 0 and below 1")
        _require_choice("optimizer.name", self.name, ("sgd", "adamw", "lion", "muon"))
        _require(not (self.nesterov and self.name == "lion"), "optimizer.nesterov", self.nesterov,
                 "False when optimizer.name='lion', which has no such form")
        split_factors(self.learning_rate_factors)
        for label in self.weight_decay_labels:
            _require_choice("optimizer.weight_decay_labels", label, PARAMETER_LABELS)
        _require_choice("optimizer.schedule", self.schedule, ("piecewise", "cosine"))
        if self.schedule == "cosine":
            for field in ("boundaries", "factors"):
                value = getattr(self, field)
                _require(not value, f"optimizer.{field}", value, "empty when optimizer.schedule='cosine'")
        _require(len(self.boundaries) == len(self.factors), "optimizer.factors", self.factors,
                 f"as many as optimizer.boundaries={self.boundaries}")
        _require(all(a < b for a, b in itertools.pairwise((0.0, *self.boundaries))), "optimizer.boundaries",
                 self.boundaries, "rising, above 0: parts of the run, or epochs")
        _require(all(0 < f <= 1e30 for f in self.factors), "optimizer.factors", self.factors, "positive, at most 1e30")

    def boundary_epochs(self, epochs: int) -> tuple[float, ...]:
        """Returns `boundaries` as epochs of a run of `epochs`."""
        if any(boundary >= 1 for boundary in self.boundaries):
            return self.boundaries
        return tuple(round(boundary * epochs, 9) for boundary in self.boundaries)  # 100 / 150 of 150 is 100


def split_factors(text: str) -> list[tuple[str, float]]:
    """Returns WHAT and FACTOR of each entry of `optimizer.learning_rate_factors`.

    Raises:
      UserError: one has another form than WHAT=FACTOR.
    """
    factors = []
    for entry in split(text):
        what, _, number = entry.rpartition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = -1.0
        _require(what != "" and 0 <= factor <= 1e30, "optimizer.learning_rate_factors", entry,
                 "WHAT=FACTOR, a kind of parameters or a glob of paths and 0 or a positive number, such as head/**=10")
        factors.append((what.strip(), factor))
    return factors


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. Two equal configurations on the same data compute the same parameters."""

    name: str = "digits_resnet"
    """Names the run: the default workdir is runs/<name>. {folder} in it is the last part of data.directory."""
    seed: int = 0
    """Seeds initialisation, the order of the images and their augmentation."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    orthogonality: OrthogonalityConfig = OrthogonalityConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", named_after(self.name, self.data.directory))
        proper = self.name.isprintable() and self.name[:1] not in ("", ".") and not set(self.name) & set("/\\")
        _require(proper, "name", self.name, "a directory name that does not begin with a dot")
        _require(0 <= self.seed < 2**31, "seed", self.seed, "at least 0 and below 2^31")
        parts, images = self.optimizer.grad_accumulation_steps, self.model.norm_images
        _require(not images or self.train.batch_size % (parts * images) == 0, "model.norm_images", images,
                 f"0, or divide train.batch_size={self.train.batch_size}"
                 + f" over optimizer.grad_accumulation_steps={parts}" * (parts > 1))
        given, warmup = self.optimizer.boundaries, self.optimizer.warmup_epochs
        for boundary in self.optimizer.boundary_epochs(self.train.epochs):
            _require(boundary < self.train.epochs, "optimizer.boundaries", given,
                     f"below train.epochs={self.train.epochs}, or parts of the run, all below 1, such as (0.5,0.75), "
                     "which suit any number of epochs")
            _require(boundary > warmup, "optimizer.boundaries", given,
                     f"after the warm-up of {warmup:g} epochs; of train.epochs={self.train.epochs} the first is at "
                     f"{boundary:g}")
        _require(warmup < self.train.epochs, "optimizer.warmup_epochs", warmup,
                 f"below train.epochs={self.train.epochs}, e.g. {self.train.epochs / 2:g}")


LOCATION_FIELDS = ("data.directory", "data.manual_directory", "data.placement", "data.workers")
"""Fields that say where images lie and not what is computed: a run may resume with other values of them."""

ADJUSTABLE_FIELDS = ("name", "train.eval_batch_size", "train.evaluate_every", "train.checkpoint_minutes",
                     *LOCATION_FIELDS)
"""Fields that do not change what is trained: a run goes on with other values of them, which its record then holds."""

SCHEDULE_FIELDS = ("optimizer.boundaries", "optimizer.factors", "optimizer.learning_rate", "optimizer.schedule",
                   "optimizer.warmup_epochs", "train.epochs")
"""Fields of the learning rate: a run goes on with other values that leave the rate of its past steps as it was."""
