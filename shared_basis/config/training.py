"""The fields that say how long and on what a run trains, what of it stays fixed, and what it learns from a teacher."""

from __future__ import annotations

import dataclasses

from shared_basis.config.checks import require, split


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The length of training, the batches, how often a run is evaluated and saved, and what it learns from."""

    epochs: int = 300
    """Passes over the training images."""
    batch_size: int = 256
    """Images a step, over all devices together. An incomplete last batch of an epoch is left out. 0
    chooses a batch that fits the number of training images when training begins, and records it."""
    eval_batch_size: int = 1000
    """Images a step in evaluation."""
    evaluate_every: int = 1
    """Epochs between evaluations; each is followed by a checkpoint. The last epoch always counts."""
    checkpoint_minutes: float = 0.0
    """Minutes after which a run is saved between evaluations too, so that of a long epoch no more than that is lost; 0
    is never. Of these checkpoints the latest two are kept, beside the best and the latest two that were evaluated."""
    record_gradients: bool = False
    """Whether each evaluation adds a line to gradients.jsonl: the norm of the cross entropy's gradient with respect to
    each basis, coefficients and kernel, averaged over the steps of the epoch (--mode=analyze draws them). What is
    trained does not change; the averages belong to the optimizer's state, so that they survive a stop."""
    freeze: str = ""
    """Parameters that are not trained: kinds (basis, coefficients, kernel, norm, bias) and globs of paths such as
    group1/**, with commas between them. Of several that match a parameter the last one counts, and one that begins with
    ! lets it train: **,!head/** leaves the head alone to be trained."""
    freeze_epochs: float = 0.0
    """Epochs after which the parameters of `freeze` are trained too, fractions allowed; 0 is never."""
    freeze_statistics: bool = False
    """Whether the network computes as in evaluation: batch normalisation by running statistics, which stay as they are,
    and without dropout."""
    label_smoothing: float = 0.0
    """The part of the target that is spread evenly over all classes (Szegedy et al. 2016); usual is 0.1."""
    mixup: float = 0.0
    """α of mixup (Zhang et al. 2018): pairs of images are blended, λ ~ Beta(α, α); usual is 0.2; 0 is none."""
    cutmix: float = 0.0
    """α of CutMix (Yun et al. 2019): a rectangle comes from another image; usual is 1; 0 is none. Where both are set,
    each image is drawn one of the two."""
    ema_decay: float = 0.0
    """Decay a step of an exponential moving average of parameters and batch statistics, which is what is evaluated,
    exported and by which the best checkpoint is chosen; usual is 0.999 to 0.9999; 0 is none. At step t it is at most
    (1 + t) / (10 + t), so that short runs are not held back by what they began with."""

    def __post_init__(self) -> None:
        for field in ("epochs", "eval_batch_size", "evaluate_every"):
            value = getattr(self, field)
            require(1 <= value < 2**31, f"train.{field}", value, "a positive whole number below 2^31")
        require(0 <= self.batch_size < 2**31, "train.batch_size", self.batch_size,
                "a positive whole number below 2^31, or 0 for a batch that fits the images")
        for field in ("checkpoint_minutes", "freeze_epochs", "mixup", "cutmix"):
            value = getattr(self, field)
            require(0 <= value <= 1e6, f"train.{field}", value, "0 or a positive number, at most 1e6")
        for field in ("label_smoothing", "ema_decay"):
            value = getattr(self, field)
            require(0 <= value < 1, f"train.{field}", value, "at least 0 and below 1")
        if self.freeze:
            require(self.freeze_epochs < self.epochs, "train.freeze_epochs", self.freeze_epochs,
                    f"below train.epochs={self.epochs}, or 0, with which train.freeze never ends")
        for pattern in split(self.freeze):
            require(pattern.strip("!/") != "", "train.freeze", pattern,
                    "a kind of parameters or a glob of paths, such as norm, group1/** or !head/**")


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """What is learned from a trained network beside the labels (Hinton et al. 2015)."""

    teacher: str = ""
    """The run of the teacher, RUN[:latest|best|STEP], for images of the same shape and classes; empty is none. It sees
    the images as they are augmented, in evaluation mode."""
    weight: float = 0.9
    """The loss is (1 − weight) · cross entropy + weight · temperature² · KL(teacher ‖ network)."""
    temperature: float = 4.0
    """Divides the logits of both for the divergence: the higher, the more weight the smaller probabilities have."""

    def __post_init__(self) -> None:
        require(0 < self.weight <= 1, "distillation.weight", self.weight, "above 0 and at most 1")
        require(0.01 <= self.temperature <= 1e3, "distillation.temperature", self.temperature, "0.01 to 1000")
