"""The command line: flags, and what becomes of mistakes. Everything else lives in `shared_basis`.

    python main.py                                                 trains the embedded default
    python main.py --config=configs/cifar_resnet.py:resnet56       another recipe and network
    python main.py --mode=evaluate --workdir=DIR                   scores a trained run
    python main.py --mode=predict --workdir=DIR --images=PATH       classifies image files, and those in directories
    python main.py --mode=export --workdir=DIR --format=onnx       the inference function as a file (or stablehlo)
    python main.py --mode=inspect --workdir=DIR                    what a run holds, without loading its arrays
    python main.py --mode=analyze --workdir=DIR                    pictures and numbers of its bases and gradients
    python main.py --mode=report --workdir=DIR                     a page on the run; of several: --runs=DIR --runs=DIR
    python main.py --mode=summary --config=…                       parameters and multiply-accumulates
    python main.py --mode=prepare --config=…                       downloads and prepares a data set
    python main.py --mode=import --checkpoint=FILE.pth --config=…  published weights into a workdir
    python main.py --mode=compress --source=DIR --config=…         a trained plain network into one with shared bases
"""

import json
import os
import signal
import sys
from typing import Any

signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the process at once and silently, from the first import on

# Huge pages save a tenth of a step on CPU; glibc reads this when a process starts (see benchmarks/README.md).
if __name__ == "__main__" and sys.platform == "linux" and sys.executable and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

from absl import app, flags, logging
from ml_collections import config_flags

from shared_basis.config import Config, check_field, from_config_dict
from shared_basis.errors import UserError, end_with

FLAGS = flags.FLAGS
_DEFAULT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", "digits_resnet.py")
_TRAINED = ("evaluate", "predict", "export", "inspect", "analyze", "report")  # of a run, with a recipe of its own
_MODES = ("train", *_TRAINED, "summary", "prepare", "import", "compress")
_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, as FILE.py[:network]; default: digits_resnet.py.")
_MODE = flags.DEFINE_enum("mode", "train", _MODES, "What to do.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; default: runs/<config>-<network>.")
_DEBUG_NANS = flags.DEFINE_bool("debug_nans", False, "Stop at the operation that gives the first NaN; slow.")
_OPTIONS: list[flags.FlagHolder[Any]] = [  # fields of `shared_basis.cli.commands.Request`
    flags.DEFINE_bool("json", False, "Print the result as one JSON object; other lines go to standard error."),
    flags.DEFINE_bool("quiet", False, "Print warnings and the result alone."),
    flags.DEFINE_bool("verbose", False, "Print details too, such as each step."),
    flags.DEFINE_bool("tensorboard", False, "train: write metrics as TensorBoard event files too."),
    flags.DEFINE_bool("report", True, "train: write report.html at the end."),
    flags.DEFINE_string("checkpoint", "latest", "latest, best or a step; for import the file."),
    flags.DEFINE_string("against", "", "inspect, analyze: compare with this step, or WORKDIR or WORKDIR:STEP."),
    flags.DEFINE_multi_string("runs", [], "report: runs to compare, or directories of runs; may be repeated."),
    flags.DEFINE_multi_string("images", [], "predict: an image file, or a directory of them; may be repeated."),
    flags.DEFINE_string("output", "", "predict, compress: a CSV file; export: the file; analyze, report: a directory."),
    flags.DEFINE_enum("format", "onnx", ("onnx", "stablehlo"), "export: what to write."),
    flags.DEFINE_enum("fold", "auto", ("auto", "basis", "composed", "none"), "export: see docs/export.md."),
    flags.DEFINE_string("source", "", "compress: the workdir of a trained plain network."),
    flags.DEFINE_integer("calibration", None, "compress: training images to measure on; 0 is none."),
    flags.DEFINE_float("budget", None, "compress: choose the ranks for this part of the plain network."),
    flags.DEFINE_string("budget_of", "parameters", "compress: what the budget is of, parameters or macs."),
    flags.DEFINE_bool("spectra", False, "compress: tell how much can be shared, and write no run.")]
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes, which TPU pods and SLURM tell.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where nothing tells it.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes, likewise.")
_PROCESS = flags.DEFINE_integer("process", None, "Number of this process, from 0, likewise.")


def parse() -> None:
    """Parses the command line; raises `UserError` with one line for any mistake in it."""
    program, *arguments = sys.argv
    for argument in arguments:
        name = argument.lstrip("-").split("=")[0]
        if name.startswith("config."):
            check_field(name.removeprefix("config."))
    files = [argument for argument in arguments if argument.startswith(("--config=", "-config="))]
    for file in (path.partition("=")[2].partition(":")[0] for path in files):
        if not os.path.isfile(file):
            raise UserError(f"--config={file}: no such file; recipes are configs/*.py, as FILE.py[:network].")
    try:  # the file comes first: the fields of the others are its own
        rest = FLAGS([program, *(files or [f"--config={_DEFAULT}"]), *(arg for arg in arguments if arg not in files)])
        _CONFIG.value.to_dict()  # a configuration file that is missing shows only on use
    except SystemExit:  # --help, for which absl has exit code 1
        sys.exit()
    except BrokenPipeError:  # --help | head
        raise
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"{error} (see --help; fields of the recipe are set like --config.seed=1).") from error
    except Exception as error:  # a configuration file is code and may raise anything
        text = str(error).replace("\\n", "\n") or type(error).__name__
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        raise UserError(" ".join(dict.fromkeys((lines[0], lines[-1], *files[-1:])))) from error
    if FLAGS.quiet and FLAGS.verbose:
        raise UserError("--quiet --verbose: choose one of the two.")
    if rest[1:]:
        raise UserError(f"unexpected argument {rest[1]!r}; flags look like --mode=train, see --help.")


def _at_home(value: Any) -> Any:
    """Returns a flag's value with the user's home for a ~, which no shell expands after a =."""
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def run() -> None:
    """Does what the flags say, and prints the result."""
    from shared_basis.cli import commands
    from shared_basis.runtime import distributed
    with distributed.jax_runtime(_DISTRIBUTED.value, _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _DEBUG_NANS.value):
        # What is set here of a trained run's configuration need suit that one alone.
        config = Config() if _MODE.value in _TRAINED else from_config_dict(_CONFIG.value)
        request = commands.Request(
            config, config_flags.get_override_values(FLAGS["config"]),
            _at_home(_WORKDIR.value or os.path.join("runs", _CONFIG.value.name)), bool(_WORKDIR.value),
            **{option.name: _at_home(option.value) for option in _OPTIONS})
        result, text = commands.run(_MODE.value, request)
        print(json.dumps(result) if request.json else text)


if __name__ == "__main__":
    logging.set_verbosity(logging.FATAL)  # what fails is told in one line
    app.define_help_flags()
    end_with(parse, run)
