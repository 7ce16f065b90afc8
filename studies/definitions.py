"""The definitions of the studies on sharing with orthogonality: networks, settings and hypotheses."""

from __future__ import annotations

import dataclasses

JPEG = "CIFAR-10 (JPEG copy)"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of a study: a network and changes to its recipe."""

    label: str
    network: str
    settings: tuple[str, ...] = ()
    """Additional flags of main.py."""


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A claim about two variants: the final error of `variant` minus that of `reference` is below `margin` points.

    It is judged by the 95 % confidence interval of the difference, paired by seed: confirmed if the whole interval is
    below the margin, refuted if it is above, otherwise undecided.
    """

    claim: str
    variant: str
    reference: str
    margin: float = 0.0


@dataclasses.dataclass(frozen=True)
class Study:
    """Networks that are trained with the same recipe over several seeds."""

    title: str
    question: str
    config: str
    """The recipe, a file in configs/."""
    seeds: int
    groups: tuple[tuple[Variant, ...], ...]
    """Groups of variants to compare; the first variant of each group is the reference."""
    settings: tuple[str, ...] = ()
    """Flags of main.py for all variants."""
    contrasts: tuple[tuple[str, str], ...] = ()
    """Pairs of labels of variants that should differ in only one respect."""
    hypotheses: tuple[Hypothesis, ...] = ()
    """The claims made before the first run."""
    needs_images: bool = False
    """Whether a directory of images must be given."""
    first_seed: int = 0
    """The first seed; a study suggested by an earlier one uses other seeds."""
    published: str = ""
    """The data set in `studies.published` whose errors are comparable."""

    @property
    def variants(self) -> tuple[Variant, ...]:
        """All variants, in order."""
        return tuple(variant for group in self.groups for variant in group)


NO_PENALTY = "--config.orthogonality.method=none"
EXACT = "--config.orthogonality.method=exact"


def _ways(depth: int, rank: int) -> tuple[Variant, ...]:
    """Returns the kinds of sharing for a ResNet of `depth` with `rank` shared elements in its first group."""
    net, shared = f"resnet{depth}", f"s{rank}u1"
    return (
        Variant(f"{net} plain", net),
        Variant(f"{net} single", f"{net}-{shared}"),
        Variant(f"{net} double", f"{net}-{shared}-double"),
        Variant(f"{net} double, no penalty", f"{net}-{shared}-double", (NO_PENALTY,)),
        Variant(f"{net} double, exact", f"{net}-{shared}-double", (EXACT,)),
        Variant(f"{net} shared only", f"{net}-s{rank}u0-double"),
        Variant(f"{net} non-shared", f"{net}-s0u{rank}"),
        Variant(f"{net} tied", f"{net}-tied"),
        Variant(f"{net} template2", f"{net}-template2"),
    )


def _contrasts(*nets: str) -> tuple[tuple[str, str], ...]:
    """Returns contrasts that isolate the parts of double sharing, for the networks labelled `nets`."""
    ends = ((" double, no penalty", " double"), (" double", " double, exact"), (" single", " double"),
            (" shared only", " double"), (" non-shared", " double"), (" tied", " double"), (" template2", " double"))
    return tuple((net + one, net + other) for net in nets for one, other in ends)


def _cifar(epochs: int) -> tuple[str, ...]:
    """Returns flags for the published recipe scaled to `epochs`, on a directory of images."""
    return (f"--config.train.epochs={epochs}", f"--config.optimizer.boundaries=({epochs * 0.5}, {epochs * 0.75})",
            f"--config.train.evaluate_every={max(1, epochs // 60)}", "--config.data.name=folder")


_CLAIM = (
    (Variant("R32 plain", "resnet32"), Variant("R32-S8U1", "resnet32-s8u1"), Variant("R32-S16U1", "resnet32-s16u1"),
     Variant("R32-S16U1*", "resnet32-s16u1-double"),
     Variant("R32-S16U1*, no penalty", "resnet32-s16u1-double", (NO_PENALTY,)),
     Variant("R32-S16U0*, shared only", "resnet32-s16u0-double"), Variant("R32-U16, non-shared", "resnet32-s0u16"),
     Variant("R32 tied", "resnet32-tied"), Variant("R32 template2", "resnet32-template2")),
    (Variant("R56 plain", "resnet56"), Variant("R56-S16U1", "resnet56-s16u1"),
     Variant("R56-S16U1*", "resnet56-s16u1-double"),
     Variant("R56-S16U1*, no penalty", "resnet56-s16u1-double", (NO_PENALTY,))),
)

_CLAIM_CONTRASTS = (("R32-S16U1*, no penalty", "R32-S16U1*"), ("R56-S16U1*, no penalty", "R56-S16U1*"),
                    ("R32-S16U1", "R32-S16U1*"), ("R56-S16U1", "R56-S16U1*"))

_WEIGHTS = tuple(
    Variant(f"R56-S16U1*, λ={weight} {reduction}", "resnet56-s16u1-double",
            (f"--config.orthogonality.weight={float(weight)}", f"--config.orthogonality.reduction={reduction}"))
    for reduction in ("mean", "sum") for weight in ("0.1", "1", "10", "100"))

_FASHION = ("--config.data.name=fashion_mnist", "--config.data.mean=(0.286,)", "--config.data.std=(0.353,)",
            "--config.data.pad=2", "--config.data.train_examples=4000", "--config.train.epochs=15",
            "--config.train.batch_size=64", "--config.optimizer.boundaries=(7.5, 11.25)",
            "--config.train.evaluate_every=5")

_CIFAR15 = ("--config.data.name=folder", "--config.data.validation=0.1", "--config.data.split_seed=0",
            "--config.train.epochs=15", "--config.train.batch_size=128", "--config.optimizer.schedule=cosine",
            "--config.optimizer.boundaries=()", "--config.optimizer.factors=()", "--config.optimizer.warmup_epochs=1.0")

_RATES = (0.3, 1.0)
"""Learning rates, for ResNets on the digits."""

STUDIES = {
    "digits": Study(
        "Handwritten digits", "Do small networks on small images show what the paper claims of large ones?",
        "configs/digits_resnet.py", 5, (_ways(20, 8), _ways(56, 8)),
        ("--config.train.epochs=12", "--config.train.evaluate_every=3"), _contrasts("resnet20", "resnet56")),
    "fashion": Study(
        "Fashion-MNIST, a fifteenth of its training images",
        "The same on larger images, as far as two cores can (about five minutes per run).",
        "configs/cifar_resnet.py", 3, (
            (Variant("R20 plain", "resnet20"), Variant("R20-S16U1*", "resnet20-s16u1-double"),
             Variant("R20-S16U1*, no penalty", "resnet20-s16u1-double", (NO_PENALTY,)),
             Variant("R20-S16U1*, exact", "resnet20-s16u1-double", (EXACT,)),
             Variant("R20 tied", "resnet20-tied")),),
        _FASHION,
        (("R20-S16U1*, no penalty", "R20-S16U1*"), ("R20-S16U1*", "R20-S16U1*, exact"), ("R20 tied", "R20-S16U1*"))),
    "exact": Study(
        "Fashion-MNIST, a fifteenth of its training images: exact orthogonality",
        "The study above leaves open whether exact orthogonality is better than the penalty. These are other seeds, "
        "whose number was decided before any of them ran.",
        "configs/cifar_resnet.py", 5, (
            (Variant("R20-S16U1*", "resnet20-s16u1-double"),
             Variant("R20-S16U1*, exact", "resnet20-s16u1-double", (EXACT,))),), _FASHION, first_seed=3),
    "rates": Study(
        "Handwritten digits: orthogonality at larger learning rates",
        "At the recipes' learning rates we measured no significantly lower error with the penalty. Does it permit "
        "larger learning rates? The recipe uses 0.1. The hypotheses, the seeds (others than those of the first study)"
        " and the test were committed before the first run, after a pilot (seed 0) in which ResNet-20 S8U1* at rate "
        "1.0 had an error of 1.7 % with the penalty and 7.6 % without. At 3.0 it diverged with the penalty and did "
        "not learn without it. Without batch normalisation (frozen initial statistics, rates from 0.001 to 0.05) it "
        "did not learn either way, so that is not a part of this study.",
        "configs/digits_resnet.py", 5, tuple(
            tuple(Variant(f"{label}, rate {rate}", network, (f"--config.optimizer.learning_rate={rate}", *settings))
                  for label, network, settings in (
                      ("plain", "resnet20", ()), ("double", "resnet20-s8u1-double", ()),
                      ("double, no penalty", "resnet20-s8u1-double", (NO_PENALTY,)),
                      ("double, exact", "resnet20-s8u1-double", (EXACT,)))) for rate in _RATES),
        ("--config.train.epochs=12", "--config.train.evaluate_every=3"),
        tuple((f"double, rate {rate}", f"double, exact, rate {rate}") for rate in _RATES), first_seed=5,
        hypotheses=tuple(Hypothesis(f"({letter}) at {rate}: {claim}", f"{one}, rate {rate}", f"{other}, rate {rate}")
                         for letters, rate in zip(("ab", "cd"), _RATES, strict=True) for letter, claim, one, other in (
                             (letters[0], "the penalty lowers the error", "double", "double, no penalty"),
                             (letters[1], "exact orthogonality lowers it", "double, exact", "double, no penalty")))),
    "compact": Study(
        "Handwritten digits of 32×32 pixels: compact networks",
        "Do MobileNetV1 and ShuffleNet V2, whose families the paper mentions, tolerate sharing of their 1×1 layers? "
        "The narrow plain networks have as many parameters as the shared ones. Hypotheses, seeds and test were written "
        "before the first run. At the original 8×8 pixels, MobileNet's four strides leave one pixel; in a pilot (rows "
        "not kept) it hardly trained, plain or shared. Hence the images are enlarged to 32×32, for 24 epochs.",
        "configs/digits_resnet.py", 3, (
            (Variant("MobileNet plain", "mobilenetv1"), Variant("MobileNet shared", "mobilenetv1-shared"),
             Variant("MobileNet S64U4", "mobilenetv1-s64u4"), Variant("MobileNet plain, narrow", "mobilenetv1w26")),
            (Variant("ShuffleNet V2 plain", "shufflenetv2_x1_0"),
             Variant("ShuffleNet V2 shared++", "shufflenetv2_x1_0-shared++"),
             Variant("ShuffleNet V2 plain, narrow", "shufflenetv2_x1_0w92"))),
        ("--config.data.image_size=32", "--config.data.pad=4", "--config.train.epochs=24"),
        (("MobileNet plain, narrow", "MobileNet shared"), ("MobileNet plain, narrow", "MobileNet S64U4"),
         ("MobileNet shared", "MobileNet S64U4"), ("ShuffleNet V2 plain, narrow", "ShuffleNet V2 shared++")),
        hypotheses=tuple(
            Hypothesis(claim, f"{net} {form}", f"{net} {other}", margin) for net, form, letters in (
                ("MobileNet", "shared", "ab"), ("ShuffleNet V2", "shared++", "cd")) for claim, other, margin in (
                (f"({letters[0]}) {net}: sharing costs at most 1 point", "plain", 1.0),
                (f"({letters[1]}) {net}: sharing is better than a narrow plain network", "plain, narrow", 0.0)))),
    "cifar15": Study(
        f"{JPEG}, 15 epochs",
        "A part of the paper's claim, of a size that two CPU cores could run. Of the 50,000 training images 5,000 are "
        "held out to select the best epoch; the 10,000 test images are scored after each epoch and select nothing. The "
        "hypotheses, three seeds and the test (the 95 % interval of the difference of final errors, paired by seed, by "
        "Student's t) were committed before the first run. Three seeds can resolve only large differences.",
        "configs/cifar_resnet.py", 3, (
            (Variant("R32 plain", "resnet32"), Variant("R32-S16U1*", "resnet32-s16u1-double"),
             Variant("R32-S16U1*, no penalty", "resnet32-s16u1-double", (NO_PENALTY,)),
             Variant("R32-S16U1*, exact", "resnet32-s16u1-double", (EXACT,)),
             Variant("R32 plain, narrow", "resnet32w12")),), _CIFAR15,
        hypotheses=(
            Hypothesis("(a) S16U1* is not worse than plain by more than 0.5 points", "R32-S16U1*", "R32 plain", 0.5),
            Hypothesis("(b) S16U1* is better than a plain network with as many parameters", "R32-S16U1*",
                       "R32 plain, narrow"),
            Hypothesis("(c) the penalty improves S16U1*", "R32-S16U1*", "R32-S16U1*, no penalty"),
            Hypothesis("(d) exact orthogonality improves S16U1* over the penalty", "R32-S16U1*, exact", "R32-S16U1*"),
        ), needs_images=True),
    "cifar60": Study(
        f"{JPEG}, 60 epochs", "Does the claim hold on the published recipe, scaled to 60 epochs?",
        "configs/cifar_resnet.py", 3, _CLAIM, _cifar(60), _CLAIM_CONTRASTS, needs_images=True),
    "cifar300": Study(
        f"{JPEG}, 300 epochs", "Does the claim hold on the published recipe?",
        "configs/cifar_resnet.py", 3, _CLAIM, _cifar(300), _CLAIM_CONTRASTS, needs_images=True),
    "weights": Study(
        f"{JPEG}, 60 epochs: the penalty's weight", "How much do λ, its reduction and exact orthogonality matter?",
        "configs/cifar_resnet.py", 3,
        ((Variant("R56-S16U1*, no penalty", "resnet56-s16u1-double", (NO_PENALTY,)), *_WEIGHTS,
          Variant("R56-S16U1*, exact", "resnet56-s16u1-double", (EXACT,))),), _cifar(60), needs_images=True),
    "cifar10": Study(
        "CIFAR-10, 300 epochs", "The published table, on the original images.", "configs/cifar_resnet.py", 3, _CLAIM,
        contrasts=_CLAIM_CONTRASTS, published="CIFAR-10"),
}
"""The studies, by the name for --study."""
