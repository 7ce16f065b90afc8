"""The fields of a configuration, their defaults, and what values they allow."""

from __future__ import annotations

import dataclasses
import itertools

from shared_basis.config.checks import require as _require
from shared_basis.config.checks import require_choice as _require_choice
from shared_basis.config.checks import split
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


DATA_NAMES = ("digits", "folder", "cifar10", "cifar100", "fashion_mnist", "imagenet2012")
"""The data sets that `data.name` accepts, beside those that begin with `TFDS_PREFIX`."""

TFDS_PREFIX = "tfds:"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The images, and what is done to them before the network sees them."""

    name: str = "digits"
    """'digits' (embedded), 'folder' (a directory of images), 'cifar10', 'cifar100', 'fashion_mnist' or 'imagenet2012'
    (by TFDS), or 'tfds:<name>[/<config>]', anything that TFDS finds prepared as ArrayRecord."""
    directory: str = ""
    """folder: holds train/<class>/* and test/<class>/* (or val/), or <class>/* alone. TFDS names: its data directory;
    empty is TFDS's default."""
    manual_directory: str = ""
    """TFDS names: holds source files downloaded by hand, for preparing the data set without a network."""
    train_split: str = ""
    """TFDS names: the split to train on, e.g. 'train[:90%]'; empty is 'train'."""
    test_split: str = ""
    """TFDS names: the split to test on; empty is 'test', or 'validation' where there is no labelled 'test'."""
    validation_split: str = ""
    """TFDS names: a split to choose the best checkpoint on; empty is none."""
    validation: float = 0.0
    """The part of the training images that is held out, to choose the best checkpoint on. At 0, and where the data set
    has no validation images of its own, it is chosen on the test images, as published."""
    test: float = 0.2
    """folder, without train/ and test/: the part of each class that is held out to test on."""
    split_seed: int = 0
    """Seeds what `validation` and `test` draw; apart from `seed`, so that runs of several seeds can be compared."""
    image_size: int = 0
    """Height and width in pixels that images are brought to, by `crop`; 0 keeps their size."""
    crop: str = "center"
    """'center': the shorter side is scaled to image_size and the centre cut out. 'random_resized' (ImageNet): training
    images are random parts, of 8 to 100 % of the area, scaled to image_size; test images are scaled to 8/7 of it, and
    the centre is cut out."""
    on_broken: str = "fail"
    """'fail' at an image that cannot be decoded, or 'skip' it, with a warning."""
    placement: str = "auto"
    """Where images wait for their turn: on the 'device', decoded; or on disk, from which they 'stream'. 'auto' decides
    by their size."""
    workers: int = -1
    """Processes that read and decode streamed images; 0 uses threads of the main process; −1 decides by the cores."""
    train_examples: int = 0
    """Train on this many images, a fixed random subset that does not depend on the seed; 0 is all of them."""
    test_examples: int = 0
    """Test on this many images, a fixed random subset that does not depend on the seed; 0 is all of them."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from each channel of an image in [0, 1]; one value per channel, or one for all."""
    std: tuple[float, ...] = (0.5,)
    """Divides each channel after that; one value per channel, or one for all."""
    pad: int = 0
    """Training only: zero pixels added on each side before a random crop to the original size."""
    flip: bool = False
    """Training only: mirror left and right with probability one half."""

    def __post_init__(self) -> None:
        if not self.name.startswith(TFDS_PREFIX):
            _require_choice("data.name", self.name, DATA_NAMES, f"{TFDS_PREFIX}<name>")
        _require(self.name != TFDS_PREFIX, "data.name", self.name, "followed by a name, as in 'tfds:cifar10'")
        for field in ("image_size", "train_examples", "test_examples", "pad", "split_seed"):
            value = getattr(self, field)
            _require(0 <= value < 2**31, f"data.{field}", value, "0 or a positive whole number below 2^31")
        _require(self.image_size <= 1024, "data.image_size", self.image_size, "at most 1024 pixels")
        if self.name == "folder":
            _require(bool(self.directory), "data.directory", self.directory,
                     "the directory of images when data.name='folder'")
        if self.name in ("folder", "digits"):
            for field in ("train_split", "test_split", "validation_split"):
                _require(not getattr(self, field), f"data.{field}", getattr(self, field),
                         f"empty when data.name={self.name!r}; it names splits of TFDS")
        _require(0 <= self.validation < 1, "data.validation", self.validation, "at least 0 and below 1")
        _require(not (self.validation and self.validation_split), "data.validation", self.validation,
                 f"0 when data.validation_split={self.validation_split!r}")
        _require(0 < self.test <= 1, "data.test", self.test, "above 0 and at most 1")
        _require_choice("data.crop", self.crop, ("center", "random_resized"))
        _require_choice("data.on_broken", self.on_broken, ("fail", "skip"))
        _require_choice("data.placement", self.placement, ("auto", "device", "stream"))
        _require(-1 <= self.workers <= 512, "data.workers", self.workers, "-1, or 0 to 512")
        if self.crop == "random_resized":
            _require(self.image_size > 0, "data.image_size", self.image_size,
                     "positive when data.crop='random_resized'; usual is 224")
            _require(self.placement != "device", "data.placement", self.placement,
                     "auto or stream when data.crop='random_resized', which cuts a new part out of the original image "
                     "each time")
        for field in ("mean", "std"):
            value = getattr(self, field)
            _require(len(value) in (1, 3), f"data.{field}", value, "one value, or one for each of three channels")
            _require(all(abs(v) <= 1e30 for v in value), f"data.{field}", value, "numbers up to 1e30")
        _require(all(v >= 1e-6 for v in self.std), "data.std", self.std, "positive, at least 1e-6")
        _require(self.pad <= 1024, "data.pad", self.pad, "at most 1024 pixels")


@dataclasses.dataclass(frozen=True)
class OrthogonalityConfig:
    """How filter bases are held orthonormal: by default by the penalty of the paper (Kang & Kim, section 3.2)."""

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
    """'mean' over the pairs that count (published), or their 'sum', whose pull does not fall as ranks grow."""

    def __post_init__(self) -> None:
        _require(0 <= self.weight <= 1e30, "orthogonality.weight", self.weight,
                 "0 or a positive number, at most 1e30")
        _require_choice("orthogonality.method", self.method, ("penalty", "exact", "none"))
        _require_choice("orthogonality.elements", self.elements, ("shared", "shared+unique"))
        _require_choice("orthogonality.reduction", self.reduction, ("mean", "sum"))


@takes_old_names("optimizer")
@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The descent, by default stochastic gradient descent with momentum; weight decay; a learning rate schedule."""

    name: str = "sgd"
    """'sgd' (published), 'adamw', 'lion' or 'muon', which are optax's. muon orthogonalises the updates of bases,
    coefficients and convolutions, and leaves the head, norms and biases to adamw."""
    learning_rate: float = 0.1
    learning_rate_factors: str = ""
    """Multiplies the learning rate of some parameters: WHAT=FACTOR, WHAT a kind (basis, coefficients, kernel, norm,
    bias) or a glob of paths, such as basis=0.1,head/**=10. Of several that match, the last one counts."""
    momentum: float = 0.9
    """Of sgd; the first decay rate of the others (b1, muon's beta)."""
    nesterov: bool = False
    weight_decay: float = 5e-4
    """sgd: L2 coefficient, added to the gradient before momentum (as in PyTorch). The others: decoupled, times the
    learning rate."""
    weight_decay_labels: tuple[str, ...] = PARAMETER_LABELS
    """The kinds of parameters that decay: any of basis, coefficients, kernel, norm, bias. Published: all."""
    schedule: str = "piecewise"
    """'piecewise' (constant, multiplied by `factors` after the epochs `boundaries`) or 'cosine' (to 0)."""
    boundaries: tuple[float, ...] = ()
    factors: tuple[float, ...] = ()
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
        rising = (self.warmup_epochs, *self.boundaries)
        _require(all(a < b for a, b in itertools.pairwise(rising)), "optimizer.boundaries", self.boundaries,
                 f"rising epochs after the warm-up of {self.warmup_epochs:g}")
        _require(all(0 < f <= 1e30 for f in self.factors), "optimizer.factors", self.factors, "positive, at most 1e30")


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
    """Names the run: the default workdir is runs/<name>."""
    seed: int = 0
    """Seeds initialisation, the order of the images and their augmentation."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    orthogonality: OrthogonalityConfig = OrthogonalityConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        proper = self.name.isprintable() and self.name[:1] not in ("", ".") and not set(self.name) & set("/\\")
        _require(proper, "name", self.name, "a directory name that does not begin with a dot")
        _require(0 <= self.seed < 2**31, "seed", self.seed, "at least 0 and below 2^31")
        parts, images = self.optimizer.grad_accumulation_steps, self.model.norm_images
        _require(not images or self.train.batch_size % (parts * images) == 0, "model.norm_images", images,
                 f"0, or divide train.batch_size={self.train.batch_size}"
                 + f" over optimizer.grad_accumulation_steps={parts}" * (parts > 1))
        for boundary in self.optimizer.boundaries:
            _require(boundary < self.train.epochs, "optimizer.boundaries", self.optimizer.boundaries,
                     f"below train.epochs={self.train.epochs}; when you shorten a run, scale them with it")
        _require(self.optimizer.warmup_epochs < self.train.epochs, "optimizer.warmup_epochs",
                 self.optimizer.warmup_epochs, f"below train.epochs={self.train.epochs}")


LOCATION_FIELDS = ("data.directory", "data.manual_directory", "data.placement", "data.workers")
"""Fields that say where images lie and not what is computed: a run may resume with other values of them."""
