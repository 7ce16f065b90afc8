"""The command line: flags, error handling and exit codes.

    python main.py                                                 trains the embedded default
    python main.py --images=DIR                                    trains on a folder of photographs
    python main.py --workdir=DIR                                   goes on with the run there
    python main.py --config=configs/cifar_resnet.py:resnet56       another recipe and network
    python main.py --init=RUN --config=… --workdir=DIR             begins with the weights of a run, or of a file
    python main.py --mode=evaluate --workdir=DIR                   scores a trained run; on other images: --images=PATH
    python main.py --mode=predict --workdir=DIR --images=PATH       classifies image files, and those in directories
    python main.py --mode=export --workdir=DIR --format=onnx       its function as a file; --format=pytorch: its weights
    python main.py --mode=inspect --workdir=DIR                    what a run holds, without loading its arrays
    python main.py --mode=analyze --workdir=DIR                    pictures and numbers of its bases and gradients
    python main.py --mode=report --workdir=DIR                     a page on the run; of several: --runs=DIR --runs=DIR
    python main.py --mode=summary --config=…                       parameters and multiply-accumulates
    python main.py --mode=prepare --config=…                       downloads and prepares a data set
    python main.py --mode=import --weights=FILE.pth --config=…     published weights into a workdir
    python main.py --mode=compress --source=DIR --budget=0.5       a trained plain network into one with shared bases
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import config_flags

from shared_basis.config import RENAMED, check_field
from shared_basis.errors import RenamedWarning, UserError, note_renamed


def _find_recipes() -> Path:
    """Returns the directory of the recipes: beside main.py or, where that is not, as pip has installed them."""
    beside, default = Path(__file__).resolve().parents[2] / "configs", "digits_resnet.py"
    if (beside / default).is_file():
        return beside
    try:
        installed = importlib.metadata.files("shared-basis") or []
    except importlib.metadata.PackageNotFoundError:
        installed = []
    return next((Path(str(file.locate())).resolve().parent for file in installed if file.name == default), beside)


CONFIGS = _find_recipes()

TRAINED_MODES = ("evaluate", "predict", "export", "inspect", "analyze", "report")
"""Modes of a run, which has a recipe of its own."""

MODES = ("train", *TRAINED_MODES, "summary", "prepare", "import", "compress")


def define_flags(argv: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
    """Returns all flags, and the names of those that are fields of `shared_basis.cli.commands.Request`.

    Args:
      argv: the command line, to which ml_collections looks for fields of the recipe.
    """
    values = flags.FlagValues()  # and not absl's global ones, which belong to the program that imports this package

    def enum(name: str, default: str, choices: Sequence[str], text: str) -> None:
        flags.DEFINE_enum(name, default, choices, text, flag_values=values)

    def string(name: str, default: str | None, text: str) -> None:
        flags.DEFINE_string(name, default, text, flag_values=values)

    def boolean(name: str, default: bool, text: str) -> None:
        flags.DEFINE_bool(name, default, text, flag_values=values)

    def integer(name: str, text: str) -> None:
        flags.DEFINE_integer(name, None, text, flag_values=values)

    config_flags.DEFINE_config_file("config", None, "Recipe, as FILE.py[:network]; default: that of the run in "
                                    "--workdir, folder.py with --images, or digits_resnet.py.",
                                    flag_values=values, sys_argv=list(argv))
    boolean("help", False, "Show this help.")
    enum("mode", "train", MODES, "What to do.")
    string("workdir", None, "Directory of the run; default: runs/<name of the recipe>.")
    boolean("debug_nans", False, "Stop at the operation that gives the first NaN; slow.")
    boolean("distributed", False, "Join the other processes, which TPU pods and SLURM announce.")
    string("coordinator", None, "HOST:PORT of process 0, when it cannot be auto-detected.")
    integer("processes", "Number of processes, when it cannot be auto-detected.")
    integer("process", "Number of this process, from 0, when it cannot be auto-detected.")
    before = set(values)
    boolean("json", False, "Print the result as one JSON object; other lines go to standard error.")
    boolean("quiet", False, "Print warnings and the result alone.")
    boolean("verbose", False, "Print details too, such as each step.")
    boolean("tensorboard", False, "train: write metrics as TensorBoard event files too.")
    boolean("report", True, "train: write report.html at the end.")
    string("checkpoint", "latest", "The checkpoint of the run: latest, best or a step.")
    string("init", "", "train: begin with these weights: RUN, RUN:best, RUN:STEP, or a file of PyTorch weights.")
    string("weights", "", "import: the file, of torch.save or safetensors.")
    string("classes", "", "import, train --init=FILE: the names of the file's outputs, one a line.")
    string("against", "", "inspect, analyze: compare with this step, or WORKDIR or WORKDIR:STEP.")
    flags.DEFINE_multi_string("runs", [], "report: runs, or directories of them; may be repeated.", flag_values=values)
    flags.DEFINE_multi_string("images", [], "The folder of images to train on, or to evaluate on. predict: an image "
                              "file, or a directory of them; may be repeated.", flag_values=values)
    string("output", "", "Where the result goes: the file of predict, export and compress --spectra, the directory of "
           "analyze and report.")
    enum("format", "onnx", ("onnx", "stablehlo", "pytorch"), "export: what to write.")
    enum("fold", "auto", ("auto", "basis", "composed", "none"), "export: see docs/export.md.")
    enum("quantize", "none", ("none", "int8", "float16"), "export: kernels of 8 or 16 bits, in ONNX.")
    flags.DEFINE_float("tolerance", 1.0, "export: points of accuracy --quantize may cost.", flag_values=values)
    string("source", "", "compress: the workdir of a trained plain network, or a file of its weights.")
    integer("calibration", "compress, train --init=PLAIN: training images to measure on; 0 is none.")
    flags.DEFINE_float("budget", None, "compress, train --init=PLAIN: choose the ranks for this part of the plain "
                       "network.", flag_values=values)
    string("budget_of", "parameters", "compress, train --init=PLAIN: what the budget is of, parameters or macs.")
    boolean("spectra", False, "compress: report how much can be shared, and write no run.")
    return values, sorted(set(values) - before)


def main() -> NoReturn:
    """Is the program: reads `sys.argv`, runs what it asks for, and ends the process.

    Where another program runs it (runpy, `%run` in a notebook), that goes on: it is left with a `SystemExit`.
    """
    own_process = sys.argv == sys.orig_argv[-len(sys.argv):]
    if own_process:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends it at once and silently while packages are imported
        # Huge pages save a tenth of a step on CPU; glibc reads this when a process starts (see benchmarks/README.md).
        if sys.platform == "linux" and sys.executable and "GLIBC_TUNABLES" not in os.environ:
            os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        _print_anything()
    logging.set_verbosity(logging.FATAL)  # failures end in one line
    _print_notes()
    run_and_exit(lambda: run(*parse(sys.argv)), own_process=own_process)


def _print_anything() -> None:
    """Lets the process print where its output is closed, or in an encoding that lacks a letter."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # open as long as the process
        else:
            stream.reconfigure(errors="backslashreplace")


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
    """Returns the values of all flags, and the names of those that are fields of `shared_basis.cli.commands.Request`.

    Args:
      argv: the command line, the program first.

    Raises:
      UserError: with one line, for any invalid argument.
      SystemExit: help was asked for, and is printed.
    """
    program, *arguments = map(_renamed, _joined(argv))
    files = [argument for argument in arguments if argument.startswith(("--config=", "-config="))]
    recipes = files or [f"--config={CONFIGS / _default_recipe(arguments)}"]
    ordered = [program, *recipes,  # whose fields the others set
               *(argument for argument in arguments if argument not in files)]
    values, options = define_flags(ordered)
    if any(argument in ("-h", "-help", "--help", "--helpfull", "--helpshort") for argument in arguments):
        print(f"{__doc__}\n{values.get_help()}")
        sys.stdout.flush()
        sys.exit()
    for argument in arguments:
        name = argument.lstrip("-").split("=")[0]
        if name.startswith("config."):
            check_field(name.removeprefix("config."))
    for file in (path.partition("=")[2].partition(":")[0] for path in recipes):
        if not os.path.isfile(file):
            raise UserError(f"--config={file}: no such file; a recipe is FILE.py[:network], and those of this package "
                            f"lie in {CONFIGS}.")
    try:
        rest = values(ordered)
        values.config.to_dict()  # a configuration file that is missing shows only on use
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"{error} (see --help; fields of the recipe are set like --config.seed=1).") from error
    except Exception as error:  # a configuration file is code and may raise anything
        text = str(error).replace("\\n", "\n") or type(error).__name__
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        raise UserError(" ".join(dict.fromkeys((lines[0], lines[-1], *files[-1:])))) from error
    values["config"].present = len(files)  # whether the user has named a recipe
    if values.quiet and values.verbose:
        raise UserError("--quiet --verbose: choose one of the two.")
    if rest[1:]:
        raise UserError(f"unexpected argument {rest[1]!r}; flags look like --mode=train, see --help.")
    return values, options


def _joined(argv: Sequence[str]) -> list[str]:
    """Returns the command line with `--config FILE` as one argument, `--config=FILE`; likewise `--mode`, `--images`."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1].lstrip("-") in ("config", "mode", "images") and joined[-1].startswith("-"):
            joined[-1] = f"--{joined[-1].lstrip('-')}={argument}"
        else:
            joined.append(argument)
    return joined


def _default_recipe(arguments: Sequence[str]) -> str:
    """Returns the recipe of a command line that names none: that of folders where images are given to train on."""
    given = dict(argument.lstrip("-").partition("=")[::2] for argument in arguments if argument.startswith("-"))
    about_folder = "images" in given and given.get("mode", "train") in ("train", "summary", "prepare", "import")
    return "folder.py" if about_folder else "digits_resnet.py"


def _renamed(argument: str) -> str:
    """Returns an argument that sets a field by its name of an earlier version with the present one, with a note."""
    flag, equals, value = argument.partition("=")
    dashes = flag[:len(flag) - len(flag.lstrip("-"))]
    old = flag.removeprefix(f"{dashes}config.")
    if not dashes or old == flag or old not in RENAMED:
        return argument
    note_renamed(f"--config.{old}", f"--config.{RENAMED[old]}")
    return f"{dashes}config.{RENAMED[old]}{equals}{value}"


def _print_notes() -> None:
    """Has notes on earlier names printed in one line, as other warnings are not."""
    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        if issubclass(category, RenamedWarning):
            print(f"note: {message}", file=sys.stderr)
        else:
            others(message, category, *place, **options)

    warnings.showwarning = show


def _expand_user(value: Any) -> Any:
    """Returns a flag's value with the user's home for a ~, which no shell expands after a =."""
    if isinstance(value, list):
        return [_expand_user(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def run(values: flags.FlagValues, options: Sequence[str]) -> None:
    """Does what the flags `values` say, and prints the result; `options` are those that are fields of `Request`."""
    from shared_basis.cli import commands, configuration  # here, so that errors in flags do not wait for these imports
    from shared_basis.runtime import distributed

    with distributed.jax_runtime(values.distributed, values.coordinator, values.processes, values.process,
                                 values.debug_nans):
        config, overrides, workdir = configuration.read(values, values.mode in TRAINED_MODES)
        request = commands.Request(config, overrides, workdir, bool(values.workdir),
                                   **{name: _expand_user(values[name].value) for name in options})
        result, text = commands.run(values.mode, request)
        if distributed.is_main_process():
            _print_result(json.dumps(result) if request.json else text)


def _print_result(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:  # such as a full disk that output is directed to
        raise UserError(f"the result cannot be written to standard output: {error.strerror}.") from error


def run_and_exit(*commands: Callable[[], None], own_process: bool = True) -> NoReturn:
    """Runs `commands` and ends the process, or where it is another program's raises `SystemExit`.

    The exit code is 0; 2 for a `UserError`, which is printed in one line; 1, silently, where nobody reads what is
    printed; or 128 + the number of the signal that stopped it (130 for Ctrl-C, 143 for SIGTERM; training catches them,
    to save). A `SystemExit` goes on as it is.
    """
    if own_process:
        sys.unraisablehook = lambda unraisable: None  # writes and reads that Orbax abandons print tracebacks by it
    code = 0
    try:
        for command in commands:
            command()
        sys.stdout.flush()
    except UserError as error:
        # Threads of a restore that failed may still print tracebacks: not between these words, nor at the end.
        stderr = sys.stderr
        if own_process:
            sys.stderr = io.StringIO()
        stderr.write(f"error: {error}\n")
        stderr.flush()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        if own_process:
            os._exit(2)
        code = 2
    except BrokenPipeError:  # who reads this, such as head, has read enough
        if own_process:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        code = 1
    except KeyboardInterrupt as interrupt:
        print(*interrupt.args or ["stopped"], file=sys.stderr)
        code = getattr(interrupt, "exit_code", 130)
    sys.exit(code)
