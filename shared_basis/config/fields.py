"""The fields of a configuration, their defaults and their validation."""

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
"""The kinds of parameters, e.g. to limit weight decay to some: filter basis elements (shared and unique), coefficients,
ordinary kernels, scale and bias of normalisations, and biases of linear layers. Parameters of other names count as
kernels if they have two or more axes, otherwise as biases; see `optim.labels`."""


@takes_old_names("model")
@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network. `name` follows the naming grammar of `shared_basis.create_model`."""

    name: str = "resnet20-s16u1-double"
    """Name of the network, including its sharing; see docs/networks.md."""
    stem: str = "cifar"
    """Stem of the network: 'cifar' for small images (3×3); other stems require a network for large images."""
    dtype: str = "float32"
    """Compute dtype: 'float32' or 'bfloat16'. Parameters, batch statistics and the penalty are always float32."""
    scan_blocks: str = "auto"
    """Whether to compute identical blocks in a loop (scan), which compiles faster and saves memory by recomputing
    activations in the backward pass: 'yes', 'no' or 'auto' (on CPU for networks with bases and for groups of 9 or more
    blocks, where it is faster or needs less memory; elsewhere no, unmeasured)."""
    norm_images: int = 0
    """Training only: number of images per group over which batch normalisation computes its statistics, like the
    per-GPU share in PyTorch's DataParallel; running statistics are the mean over groups. 0: the whole batch. Results
    do not depend on the number of devices; groups within a device's shard need no communication."""

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
    """'penalty': the loss is cross entropy + weight · penalty. 'exact': bases are orthonormal after every step; weight
    and reduction have no effect, and weight decay skips these bases. 'none': neither (the penalty is reported)."""
    weight: float = 10.0
    """λ, the weight of the penalty; 0 disables it, like method 'none'."""
    elements: str = "shared"
    """Basis elements to penalise: 'shared', or 'shared+unique' (CIFAR-10), which adds pairs of a unique element with a
    shared one or with another one of its layer."""
    reduction: str = "mean"
    """Reduction over the penalised pairs: 'mean' (published) or 'sum'; the effect of a sum on an element does not
    depend on the ranks."""

    def __post_init__(self) -> None:
        _require(0 <= self.weight <= 1e30, "orthogonality.weight", self.weight,
                 "0 or a positive number, at most 1e30")
        _require_choice("orthogonality.method", self.method, ("penalty", "exact", "none"))
        _require_choice("orthogonality.elements", self.elements, ("shared", "shared+unique"))
        _require_choice("orthogonality.reduction", self.reduction, ("mean", "sum"))


@takes_old_names("optimizer")
@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer (stochastic gradient descent with momentum by default), its schedule and weight decay."""

    name: str = "sgd"
    """'sgd' (published), or optax's 'adamw', 'lion' or 'muon'. Muon orthogonalises the updates of bases, coefficients
    and convolutions, and uses adamw for the head, norms and biases."""
    learning_rate: float = 0.1
    """Learning rate after warm-up and before any decay."""
    learning_rate_factors: str = ""
    """Learning-rate factors of some parameters, as WHAT=FACTOR. WHAT is a kind (basis, coefficients, kernel, norm,
    bias) or a glob of paths, e.g. basis=0.1,head/**=10. If several match a parameter, the last one applies."""
    momentum: float = 0.9
    """Momentum of sgd; the first decay rate of the other optimizers (b1, Muon's beta)."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = 5e-4
    """sgd: coefficient of L2 regularisation, added to the gradient before momentum (as in PyTorch). Others: decoupled
    weight decay, multiplied by the learning rate."""
    weight_decay_labels: tuple[str, ...] = PARAMETER_LABELS
    """The kinds of parameters to decay: any of basis, coefficients, kernel, norm, bias. Published: all."""
    schedule: str = "piecewise"
    """'piecewise' (constant, multiplied by `factors` at the epochs `boundaries`) or 'cosine' (decays to 0)."""
    boundaries: tuple[float, ...] = ()
    """Fractions of the run if all are below 1: (0.5, 0.75) decays after half and after three quarters of the epochs.
    Otherwise epochs (fractional values allowed)."""
    factors: tuple[float, ...] = ()
    """Factors by which the learning rate is multiplied at `boundaries`."""
    warmup_epochs: float = 0.0
    """Length of the linear warm-up of the learning rate from 0, in epochs (fractional values allowed)."""
    grad_accumulation_steps: int = 1
    """Number of gradient accumulation steps N: the batch is split into N micro-batches whose gradients are averaged,
    which needs about 1/N of the activation memory (on GPU and TPU; a teacher sees the whole batch). Learning rate and
    number of updates stay the same. Batch normalisation and dropout see micro-batches, so networks with batch
    normalisation train differently."""

    def __post_init__(self) -> None:
        _require(1 <= self.grad_accumulation_steps < 2**31, "optimizer.grad_accumulation_steps",
                 self.grad_accumulation_steps, "a positive whole number")
        for field, low in (("learning_rate", 0.0), ("weight_decay", 0.0), ("warmup_epochs", 0.0)):
            value = getattr(self, field)
            _require(low <= value <= 1e30, f"optimizer.{field}", value, "0 or a positive number, at most 1e30")
        _require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "at least 0 and below 1")
        _require_choice("optimizer.name", self.name, ("sgd", "adamw", "lion", "muon"))
        _require(not (self.nesterov and self.name == "lion"), "optimizer.nesterov", self.nesterov,
                 "False when optimizer.name='lion', which has no Nesterov variant")
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
                 self.boundaries, "increasing and above 0: fractions of the run, or epochs")
        _require(all(0 < f <= 1e30 for f in self.factors), "optimizer.factors", self.factors, "positive, at most 1e30")

    def boundary_epochs(self, epochs: int) -> tuple[float, ...]:
        """Returns `boundaries` in epochs for a run of `epochs`."""
        if any(boundary >= 1 for boundary in self.boundaries):
            return self.boundaries
        return tuple(round(boundary * epochs, 9) for boundary in self.boundaries)  # 100 / 150 of 150 is 100


def split_factors(text: str) -> list[tuple[str, float]]:
    """Returns the pairs (WHAT, FACTOR) of `optimizer.learning_rate_factors`.

    Raises:
      UserError: an entry does not have the form WHAT=FACTOR.
    """
    factors = []
    for entry in split(text):
        what, _, number = entry.rpartition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = -1.0
        _require(what != "" and 0 <= factor <= 1e30, "optimizer.learning_rate_factors", entry,
                 "WHAT=FACTOR: a kind of parameters or a glob of paths, and a number of at least 0, e.g. head/**=10")
        factors.append((what.strip(), factor))
    return factors


@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration of a run. Equal configurations on the same data compute the same parameters."""

    name: str = "digits_resnet"
    """Name of the run: the default workdir is runs/<name>. {folder} stands for the last component of data.directory."""
    seed: int = 0
    """Seed for initialisation, the order of the images and their augmentation."""
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
                     f"below train.epochs={self.train.epochs}, or fractions of the run, all below 1, e.g. (0.5,0.75), "
                     "which fit any number of epochs")
            _require(boundary > warmup, "optimizer.boundaries", given,
                     f"after the warm-up of {warmup:g} epochs; with train.epochs={self.train.epochs} the first is at "
                     f"{boundary:g}")
        _require(warmup < self.train.epochs, "optimizer.warmup_epochs", warmup,
                 f"below train.epochs={self.train.epochs}, e.g. {self.train.epochs / 2:g}")


LOCATION_FIELDS = ("data.directory", "data.manual_directory", "data.placement", "data.workers")
"""Fields for where images are stored and how they are read; a run may resume with other values."""

ADJUSTABLE_FIELDS = ("name", "train.eval_batch_size", "train.evaluate_every", "train.checkpoint_minutes",
                     "data.on_broken", *LOCATION_FIELDS)
"""Fields that do not affect parameters already trained; a run may resume with other values, which are then recorded."""

SCHEDULE_FIELDS = ("optimizer.boundaries", "optimizer.factors", "optimizer.learning_rate", "optimizer.schedule",
                   "optimizer.warmup_epochs", "train.epochs")
"""Fields of the learning-rate schedule; a run may resume with other values if past learning rates do not change."""
