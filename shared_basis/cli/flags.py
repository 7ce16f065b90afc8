"""The modes and flags of the command line in one table, which defines, validates and documents them.

Imports no JAX, so that help and flag errors appear at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags


@dataclasses.dataclass(frozen=True)
class Mode:
    """A value of --mode."""

    purpose: str
    examples: tuple[tuple[str, str], ...]
    """Pairs of example arguments and a description of what they do."""
    trained: bool = False
    """Whether the mode reads a trained run, which has its own stored configuration."""


MODES = {
    "train": Mode("Train a network, or resume the run in --workdir. This is the default.", (
        ("", "trains the embedded default"),
        ("--images=DIR", "trains on a folder of photographs, DIR/<class>/*"),
        ("--workdir=DIR", "resumes the run there"),
        ("--config=configs/cifar_resnet.py:resnet56", "uses another recipe and network"),
        ("--init=RUN --config=... --workdir=DIR", "starts from the weights of a run or of a file"))),
    "evaluate": Mode("Score a trained run.", (
        ("--mode=evaluate --workdir=DIR", "on its own test images"),
        ("--mode=evaluate --workdir=DIR --images=PATH", "on other images")), trained=True),
    "predict": Mode("Classify image files.", (
        ("--mode=predict --workdir=DIR --images=PATH", "PATH is a file, or a directory of files"),), trained=True),
    "export": Mode("Write a run as a file for other programs.", (
        ("--mode=export --workdir=DIR", "its function, as ONNX"),
        ("--mode=export --workdir=DIR --quantize=int8", "the same with 8-bit kernels"),
        ("--mode=export --workdir=DIR --format=pytorch", "its weights")), trained=True),
    "inspect": Mode("Show the contents of a run without loading its arrays.", (
        ("--mode=inspect --workdir=DIR", "parameters, checkpoints, configuration"),
        ("--mode=inspect --workdir=DIR --against=OTHER", "and how two checkpoints differ")), trained=True),
    "analyze": Mode("Measure and plot the bases and gradients of a run.", (
        ("--mode=analyze --workdir=DIR", "writes plots and tables"),), trained=True),
    "report": Mode("Write an HTML report on a run, or compare several runs.", (
        ("--mode=report --workdir=DIR", "one run"),
        ("--mode=report --runs=DIR --runs=DIR", "several runs")), trained=True),
    "summary": Mode("Count parameters and multiply-accumulates, without data.", (
        ("--mode=summary --config=configs/cifar_resnet.py:resnet56-s16u1", "of a network"),)),
    "prepare": Mode("Download and prepare a data set, or check a folder of images.", (
        ("--mode=prepare --config=configs/cifar_resnet.py", "CIFAR-10"),
        ("--mode=prepare --images=DIR", "decodes every image once"))),
    "import": Mode("Create a run from published PyTorch weights.", (
        ("--mode=import --weights=FILE.pth --config=... --workdir=DIR", "for evaluation, export or fine-tuning"),)),
    "compress": Mode("Create a run with shared bases from a trained plain run.", (
        ("--mode=compress --source=RUN --budget=0.5", "keeps half of its parameters"),
        ("--mode=compress --source=RUN --spectra", "reports how much could be shared; creates no run"))),
}

TRAINED_MODES = tuple(name for name, mode in MODES.items() if mode.trained)
"""Modes that read a trained run, which has its own stored configuration."""

FOLDER_MODES = ("train", "evaluate", "export", "analyze", "report", "summary", "prepare", "import", "compress")
"""Modes in which --images names a data set folder rather than files to classify."""


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of the command line, by name, default value and help."""

    name: str
    default: Any
    """A list if the flag may be repeated."""
    text: str
    modes: tuple[str, ...] = tuple(MODES)
    """The modes that accept the flag."""
    kind: type = str
    choices: tuple[str, ...] = ()
    placeholder: str = "VALUE"
    option: bool = True
    """Whether the flag is a field of `shared_basis.cli.commands.Request`."""

    @property
    def usage(self) -> str:
        """Returns the flag as written on the command line, with its placeholder or choices."""
        if self.kind is bool:
            return f"--[no]{self.name}" if self.default else f"--{self.name}"
        return f"--{self.name}={'|'.join(self.choices) or self.placeholder}"

    def define(self, values: flags.FlagValues) -> None:
        """Defines the flag in `values`."""
        if self.choices:
            flags.DEFINE_enum(self.name, self.default, self.choices, self.text, flag_values=values)
        else:
            kinds: dict[type, Any] = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float,
                                      list: flags.DEFINE_multi_string, str: flags.DEFINE_string}
            kinds[self.kind](self.name, self.default, self.text, flag_values=values)


_SHARED = ("train", "evaluate")
_FROM_PLAIN = ("train", "compress")

CONFIG = Flag("config", None, "Recipe: a file, or the name of an installed recipe, with an optional network after a "
              "colon. Default: the recipe of the run in --workdir; folder.py with --images; else digits_resnet.py. "
              "--config.FIELD=VALUE overrides a field, e.g. --config.train.epochs=30.",
              placeholder="FILE.py[:NETWORK]", option=False)
"""Only documents --config; ml_collections defines the flag."""

FLAGS = (
    Flag("help", False, "Show this help; also: help MODE.", kind=bool, option=False),
    Flag("version", False, "Show the version.", kind=bool, option=False),
    Flag("mode", "train", "What to do.", choices=tuple(MODES), option=False),
    Flag("workdir", None, "Directory of the run. Default: runs/<name of the recipe>.", placeholder="DIR", option=False),
    Flag("json", False, "Print the result as one JSON object; other lines go to standard error.", kind=bool),
    Flag("quiet", False, "Print warnings and the result only.", kind=bool),
    Flag("verbose", False, "Also print details, such as each training step.", kind=bool),
    Flag("debug_nans", False, "Stop at the operation that produces the first NaN; slow.", kind=bool, option=False),
    Flag("distributed", False, "Train with the other processes of this TPU pod or SLURM, MPI or Kubernetes job.",
         _SHARED, bool, option=False),
    Flag("coordinator", None, "Address of process 0, if it cannot be detected.", _SHARED, placeholder="HOST:PORT",
         option=False),
    Flag("processes", None, "Number of processes, if it cannot be detected.", _SHARED, int, placeholder="N",
         option=False),
    Flag("process", None, "Index of this process, from 0, if it cannot be detected.", _SHARED, int,
         placeholder="I", option=False),
    Flag("images", [], "The folder of images to train or evaluate on; for predict, an image file or a directory of "
         "images. May be repeated.", ("predict", *FOLDER_MODES), list, placeholder="DIR"),
    Flag("checkpoint", "latest", "Checkpoint of the run to load: latest, best or a step.",
         ("evaluate", "predict", "export", "inspect", "analyze", "report", "import", "compress"), placeholder="STEP"),
    Flag("output", "", "Where to write the result: a file for predict (CSV: file, class, probability, and that of each "
         "class), export and compress --spectra, a directory for analyze and report.",
         ("predict", "compress", "export", "analyze", "report"), placeholder="PATH"),
    Flag("init", "", "Start from the weights of RUN, RUN:best, RUN:STEP, or a file of PyTorch weights.", ("train",),
         placeholder="RUN"),
    Flag("tensorboard", False, "Also write metrics as TensorBoard event files.", ("train",), bool),
    Flag("report", True, "Write report.html at the end of training.", kind=bool),
    Flag("classes", "", "File with the class names of the PyTorch weights (--init, --weights, --source), one per line.",
         ("train", "import", "compress"), placeholder="FILE"),
    Flag("calibration", None, "Number of training images for calibration when factorising a plain network; 0 for none.",
         _FROM_PLAIN, int, placeholder="N"),
    Flag("budget", None, "Choose the ranks to keep this fraction of the plain network, e.g. 0.5.", _FROM_PLAIN, float,
         placeholder="PART"),
    Flag("budget_of", "parameters", "The quantity that --budget limits: parameters or macs.", _FROM_PLAIN,
         placeholder="MEASURE"),
    Flag("source", "", "Workdir of a trained plain network, or (not for --spectra) a file with its weights.",
         ("compress",), placeholder="RUN"),
    Flag("spectra", False, "Only report how much can be shared; create no run.", ("compress",), bool),
    Flag("weights", "", "File of weights, from torch.save or safetensors.", ("import",), placeholder="FILE"),
    Flag("format", "onnx", "Format of the exported file.", ("export",), choices=("onnx", "stablehlo", "pytorch")),
    Flag("fold", "auto", "How to fold batch normalisation and bases; see docs/export.md.", ("export",),
         choices=("auto", "basis", "composed", "none")),
    Flag("quantize", "none", "Kernel precision of ONNX files.", ("export",), choices=("none", "int8", "float16")),
    Flag("tolerance", 1.0, "Percentage points of accuracy that --quantize may lose.", ("export",), float,
         placeholder="POINTS"),
    Flag("against", "", "Compare with this checkpoint: STEP, WORKDIR or WORKDIR:STEP.", ("inspect", "analyze"),
         placeholder="STEP"),
    Flag("runs", [], "Runs, or directories of runs; may be repeated.", ("report",), list, placeholder="DIR"),
)

MODES_BY_FLAG = {flag.name: flag.modes for flag in FLAGS if flag.option and flag.modes != tuple(MODES)}
"""For each field of `Request` that only some modes accept, those modes."""


def define_flags(argv: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
    """Returns all flags, and the names of those that are fields of `shared_basis.cli.commands.Request`.

    Args:
      argv: the command line, which ml_collections searches for overrides of recipe fields.
    """
    values = flags.FlagValues()  # absl's global flags belong to the importing program
    config_flags.DEFINE_config_file("config", None, CONFIG.text, flag_values=values, sys_argv=list(argv))
    for flag in FLAGS:
        flag.define(values)
    return values, sorted(flag.name for flag in FLAGS if flag.option)
