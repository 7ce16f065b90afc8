"""The fields for the length of training, batches, evaluation, frozen parameters, regularisation and distillation."""

from __future__ import annotations

import dataclasses

from shared_basis.config.checks import require, split


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of training, batches, evaluation and checkpoints, frozen parameters, and regularisation by targets."""

    epochs: int = 300
    """Number of passes over the training images."""
    batch_size: int = 256
    """Images per step, over all devices. The incomplete last batch of an epoch is dropped. 0 chooses a batch size
    for the number of training images when training begins, and records it."""
    eval_batch_size: int = 1000
    """Images per step of an evaluation."""
    evaluate_every: int = 1
    """Epochs between evaluations, each of which saves a checkpoint. The last epoch is always evaluated."""
    checkpoint_minutes: float = 0.0
    """Minutes between additional checkpoints, to limit what is lost if a long epoch is interrupted; 0 for none. The
    latest two of these are kept, besides the best and the latest two evaluated checkpoints."""
    record_gradients: bool = False
    """Whether each evaluation appends to gradients.jsonl the gradient norm of the cross entropy with respect to each
    basis, coefficients and kernel, averaged over the steps of the epoch (plotted by --mode=analyze). Training is
    unaffected; the averages are part of the optimizer state, so that they survive an interruption."""
    freeze: str = ""
    """Parameters to freeze: comma-separated kinds (basis, coefficients, kernel, norm, bias) and globs of paths such as
    group1/**. If several match a parameter, the last one applies; a leading ! unfreezes: **,!head/** trains only the
    head."""
    freeze_epochs: float = 0.0
    """Epochs after which the parameters of `freeze` are trained too (fractional values allowed); 0 for never."""
    freeze_statistics: bool = False
    """Whether to train with the network in evaluation mode: batch normalisation uses its running statistics without
    updating them, and dropout is disabled."""
    label_smoothing: float = 0.0
    """Label smoothing: fraction of the target spread evenly over all classes (Szegedy et al. 2016); 0.1 is usual."""
    mixup: float = 0.0
    """α of mixup (Zhang et al. 2018), which blends pairs of images with λ ~ Beta(α, α); 0.2 is usual, 0 disables it."""
    cutmix: float = 0.0
    """α of CutMix (Yun et al. 2019), which pastes a rectangle of another image; 1 is usual, 0 disables it. If mixup is
    enabled too, one of the two is drawn for each image."""
    ema_decay: float = 0.0
    """Decay per step of an exponential moving average (EMA) of parameters and batch statistics; the average is used for
    evaluation, export and choosing the best checkpoint. 0.999 to 0.9999 is usual, 0 disables it. At step t the decay is
    at most (1 + t) / (10 + t), so that the initial values do not dominate short runs."""

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
    """Knowledge distillation: training on the outputs of a trained network besides the labels (Hinton et al. 2015)."""

    teacher: str = ""
    """The teacher's run, RUN[:latest|best|STEP], for images of the same shape and classes; empty for none. The
    teacher runs in evaluation mode on the augmented images."""
    weight: float = 0.9
    """The loss is (1 − weight) · cross entropy + weight · temperature² · KL(teacher ‖ network)."""
    temperature: float = 4.0
    """Divisor of both networks' logits in the divergence; higher values give small probabilities more weight."""

    def __post_init__(self) -> None:
        require(0 < self.weight <= 1, "distillation.weight", self.weight, "above 0 and at most 1")
        require(0.01 <= self.temperature <= 1e3, "distillation.temperature", self.temperature, "0.01 to 1000")
