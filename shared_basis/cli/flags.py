"""The modes and flags of the command line: one table, from which they are defined, checked and explained.

It imports no JAX, so that help and errors in flags do not wait for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags


@dataclasses.dataclass(frozen=True)
class Mode:
    """What a value of --mode does."""

    purpose: str
    examples: tuple[tuple[str, str], ...]
    """Arguments, and what a call with them does."""
    trained: bool = False
    """Whether it is about a trained run, which has a recipe of its own."""


MODES = {
    "train": Mode("Train a network, or resume the run in --workdir. This is the default.", (
        ("", "trains the embedded default"),
        ("--images=DIR", "trains on a folder of photographs, DIR/<class>/*"),
        ("--workdir=DIR", "resumes the run there"),
        ("--config=configs/cifar_resnet.py:resnet56", "another recipe and network"),
        ("--init=RUN --config=... --workdir=DIR", "starts from the weights of a run, or of a file"))),
    "evaluate": Mode("Score a trained run.", (
        ("--mode=evaluate --workdir=DIR", "on its own test images"),
        ("--mode=evaluate --workdir=DIR --images=PATH", "on other images")), trained=True),
    "predict": Mode("Classify image files.", (
        ("--mode=predict --workdir=DIR --images=PATH", "PATH is a file, or a directory of files"),), trained=True),
    "export": Mode("Write a run as a file for other programs.", (
        ("--mode=export --workdir=DIR", "its function, as ONNX"),
        ("--mode=export --workdir=DIR --quantize=int8", "the same with kernels of 8 bits"),
        ("--mode=export --workdir=DIR --format=pytorch", "its weights")), trained=True),
    "inspect": Mode("Show what a run holds, without loading its arrays.", (
        ("--mode=inspect --workdir=DIR", "parameters, checkpoints, configuration"),
        ("--mode=inspect --workdir=DIR --against=OTHER", "and how two checkpoints differ")), trained=True),
    "analyze": Mode("Draw and measure the bases and gradients of a run.", (
        ("--mode=analyze --workdir=DIR", "pictures and numbers"),), trained=True),
    "report": Mode("Write a page on a run, or a comparison of several.", (
        ("--mode=report --workdir=DIR", "one run"),
        ("--mode=report --runs=DIR --runs=DIR", "several runs")), trained=True),
    "summary": Mode("Count parameters and multiply-accumulates, without data.", (
        ("--mode=summary --config=configs/cifar_resnet.py:resnet56-s16u1", "of a network"),)),
    "prepare": Mode("Download and prepare a data set, or check a folder of images.", (
        ("--mode=prepare --config=configs/cifar_resnet.py", "CIFAR-10"),
        ("--mode=prepare --images=DIR", "decodes every image once"))),
    "import": Mode("Make a run of published PyTorch weights.", (
        ("--mode=import --weights=FILE.pth --config=... --workdir=DIR", "to evaluate, export or train on"),)),
    "compress": Mode("Make a run with shared bases of a trained plain one.", (
        ("--mode=compress --source=RUN --budget=0.5", "half its parameters"),
        ("--mode=compress --source=RUN --spectra", "how much could be shared; writes no run"))),
}

TRAINED_MODES = tuple(name for name, mode in MODES.items() if mode.trained)
"""Modes of a run, which has a recipe of its own."""

FOLDER_MODES = ("train", "evaluate", "export", "analyze", "report", "summary", "prepare", "import", "compress")
"""Modes in which --images names the folder of the data set, and not files to classify."""


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of the command line, by name, default value and help."""

    name: str
    default: Any
    """Of a flag that may be repeated, a list."""
    text: str
    modes: tuple[str, ...] = tuple(MODES)
    """The modes that take it."""
    kind: type = str
    choices: tuple[str, ...] = ()
    placeholder: str = "VALUE"
    option: bool = True
    """Whether it is a field of `shared_basis.cli.commands.Request`."""

    @property
    def usage(self) -> str:
        """Returns how it is written."""
        if self.kind is bool:
            return f"--[no]{self.name}" if self.default else f"--{self.name}"
        return f"--{self.name}={'|'.join(self.choices) or self.placeholder}"

    def define(self, values: flags.FlagValues) -> None:
        """Defines it."""
        if self.choices:
            flags.DEFINE_enum(self.name, self.default, self.choices, self.text, flag_values=values)
        else:
            kinds: dict[type, Any] = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float,
                                      list: flags.DEFINE_multi_string, str: flags.DEFINE_string}
            kinds[self.kind](self.name, self.default, self.text, flag_values=values)


_SHARED = ("train", "evaluate")
_FROM_PLAIN = ("train", "compress")

CONFIG = Flag("config", None, "Recipe: a file of your own, or the name of one that is installed, and after a colon the "
              "network. Default: the recipe of the run in --workdir; folder.py with --images; else digits_resnet.py. "
              "--config.FIELD=VALUE sets a field of it, such as --config.train.epochs=30.",
              placeholder="FILE.py[:NETWORK]", option=False)
"""It is ml_collections that defines this one."""

FLAGS = (
    Flag("help", False, "Show this help; also: help MODE.", kind=bool, option=False),
    Flag("version", False, "Show the version.", kind=bool, option=False),
    Flag("mode", "train", "What to do.", choices=tuple(MODES), option=False),
    Flag("workdir", None, "Directory of the run. Default: runs/<name of the recipe>.", placeholder="DIR", option=False),
    Flag("json", False, "Print the result as one JSON object; other lines go to standard error.", kind=bool),
    Flag("quiet", False, "Print warnings and the result only.", kind=bool),
    Flag("verbose", False, "Print details too, such as each step.", kind=bool),
    Flag("debug_nans", False, "Stop at the operation that gives the first NaN; slow.", kind=bool, option=False),
    Flag("distributed", False, "Train with the other processes of this TPU pod or SLURM, MPI or Kubernetes job.",
         _SHARED, bool, option=False),
    Flag("coordinator", None, "Address of process 0, where it cannot be detected.", _SHARED, placeholder="HOST:PORT",
         option=False),
    Flag("processes", None, "Number of processes, where it cannot be detected.", _SHARED, int, placeholder="N",
         option=False),
    Flag("process", None, "Number of this process, from 0, where it cannot be detected.", _SHARED, int,
         placeholder="I", option=False),
    Flag("images", [], "The folder of images to train or to evaluate on. Of predict: an image file or a directory of "
         "them; may be repeated.", ("predict", *FOLDER_MODES), list, placeholder="DIR"),
    Flag("checkpoint", "latest", "The checkpoint of the run: latest, best or a step.",
         ("evaluate", "predict", "export", "inspect", "analyze", "report", "import", "compress"), placeholder="STEP"),
    Flag("output", "", "Where the result goes: the file of predict, export and compress --spectra, the directory of "
         "analyze and report.", ("predict", "compress", "export", "analyze", "report"), placeholder="PATH"),
    Flag("init", "", "Start from these weights: RUN, RUN:best, RUN:STEP, or a file of PyTorch weights.", ("train",),
         placeholder="RUN"),
    Flag("tensorboard", False, "Write metrics as TensorBoard event files too.", ("train",), bool),
    Flag("report", True, "Write report.html at the end of training.", kind=bool),
    Flag("classes", "", "File with the names of the outputs of PyTorch weights (--init, --weights), one a line.",
         ("train", "import"), placeholder="FILE"),
    Flag("calibration", None, "Training images to measure on when a plain network is factorised; 0 for none.",
         _FROM_PLAIN, int, placeholder="N"),
    Flag("budget", None, "Choose the ranks to keep this part of the plain network, such as 0.5.", _FROM_PLAIN, float,
         placeholder="PART"),
    Flag("budget_of", "parameters", "What --budget limits: parameters or macs.", _FROM_PLAIN,
         placeholder="MEASURE"),
    Flag("source", "", "The workdir of a trained plain network, or a file of its weights.", ("compress",),
         placeholder="RUN"),
    Flag("spectra", False, "Report how much can be shared, and write no run.", ("compress",), bool),
    Flag("weights", "", "The file, of torch.save or safetensors.", ("import",), placeholder="FILE"),
    Flag("format", "onnx", "What to write.", ("export",), choices=("onnx", "stablehlo", "pytorch")),
    Flag("fold", "auto", "How batch normalisation and bases are merged; see docs/export.md.", ("export",),
         choices=("auto", "basis", "composed", "none")),
    Flag("quantize", "none", "Kernels of 8 or 16 bits, in ONNX.", ("export",), choices=("none", "int8", "float16")),
    Flag("tolerance", 1.0, "Percentage points of accuracy that --quantize may lose.", ("export",), float,
         placeholder="POINTS"),
    Flag("against", "", "Compare with this step, or WORKDIR or WORKDIR:STEP.", ("inspect", "analyze"),
         placeholder="STEP"),
    Flag("runs", [], "Runs, or directories of them; may be repeated.", ("report",), list, placeholder="DIR"),
)

MODES_BY_FLAG = {flag.name: flag.modes for flag in FLAGS if flag.option and flag.modes != tuple(MODES)}
"""The modes that a field of `Request` is for; the others are for all modes."""


def define_flags(argv: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
    """Returns all flags, and the names of those that are fields of `shared_basis.cli.commands.Request`.

    Args:
      argv: the command line, to which ml_collections looks for fields of the recipe.
    """
    values = flags.FlagValues()  # and not absl's global ones, which belong to the program that imports this package
    config_flags.DEFINE_config_file("config", None, CONFIG.text, flag_values=values, sys_argv=list(argv))
    for flag in FLAGS:
        flag.define(values)
    return values, sorted(flag.name for flag in FLAGS if flag.option)
