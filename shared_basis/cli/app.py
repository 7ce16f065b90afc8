"""The command line: arguments, error handling and exit codes. Its modes and flags are in `shared_basis.cli.flags`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from logging import CRITICAL, getLogger
from typing import Any, NoReturn

from absl import flags, logging

from shared_basis.cli import advice, help, recipes
from shared_basis.cli.flags import MODES, TRAINED_MODES, define_flags
from shared_basis.config import RENAMED, check_field
from shared_basis.errors import RenamedWarning, UserError, note_renamed


def main() -> NoReturn:
    """Entry point of the program: parses `sys.argv`, runs the requested mode, and exits.

    When called from within another program (runpy, `%run` in a notebook), it raises `SystemExit` to return to it.
    """
    started = sys.orig_argv[-len(sys.argv):]
    own_process = started == sys.argv or started == ["shared_basis", *sys.argv[1:]]  # the latter with python -m
    if own_process:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C exits silently during imports
        # Huge pages save a fifth of a step on CPU (docs/performance-notes.md); glibc reads this when a process starts.
        if sys.platform == "linux" and sys.executable and "GLIBC_TUNABLES" not in os.environ:
            os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        _print_anything()
    logging.set_verbosity(logging.FATAL)  # failures end in one line
    for name in ("gcsfs", "google.auth"):  # they log each attempt that is retried
        getLogger(name).setLevel(CRITICAL)
    _print_notes()
    run_and_exit(lambda: run(*parse(sys.argv)), own_process=own_process)


def _print_anything() -> None:
    """Makes printing safe if an output stream is closed or its encoding lacks a character."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # stays open until exit
        else:
            stream.reconfigure(errors="backslashreplace")


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
    """Returns the values of all flags, and the names of those that are fields of `shared_basis.cli.commands.Request`.

    Args:
      argv: the command line, including the program name.

    Raises:
      UserError: an argument is invalid.
      SystemExit: help or the version was requested and has been printed.
    """
    program, *arguments = map(_renamed, _joined(argv))
    _explain(program, arguments)
    files = [f"--config={recipes.locate(argument.partition('=')[2])}" for argument in arguments if _is_recipe(argument)]
    ordered = [program, *(files or [f"--config={recipes.locate(_default_recipe(arguments))}"]),
               *(argument for argument in arguments if not _is_recipe(argument))]  # the fields that they override
    values, options = define_flags(ordered)
    for argument in arguments:
        name = argument.lstrip("-").split("=")[0]
        if argument.startswith("-") and name.startswith("config."):
            check_field(name.removeprefix("config."))
    try:
        rest = values(ordered)
        values.config.to_dict()  # a missing configuration file is only detected on access
    except flags.UnrecognizedFlagError as error:
        meant = advice.on_flag(error.flagname)
        raise UserError(f"unknown flag --{error.flagname}{meant} (see --help; set a field of the recipe with "
                        "--config.seed=1).") from error
    except Exception as error:  # a configuration file is code and may raise anything
        text = str(error).replace("\\n", "\n") or type(error).__name__
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        raise UserError(" ".join(dict.fromkeys((lines[0], lines[-1], *files[-1:])))) from error
    values["config"].present = len(files)  # whether the user named a recipe
    if values.quiet and values.verbose:
        raise UserError("--quiet and --verbose exclude each other; give one of them.")
    if rest[1:]:
        raise UserError(f"unexpected argument {rest[1]!r}: {advice.on_argument(rest[1], values)}; see --help.")
    return values, options


def _is_recipe(argument: str) -> bool:
    return argument.startswith(("--config=", "-config="))


def _explain(program: str, arguments: Sequence[str]) -> None:
    """Prints the help or the version and exits, if either was requested.

    Raises:
      UserError: help was requested for an unknown mode.
    """
    asked = {argument.partition("=")[0] for argument in arguments}
    if asked & {"--version", "-version"}:
        text = help.version()
    elif arguments[:1] == ["help"]:
        topics = [argument.removeprefix("--mode=") for argument in arguments[1:]]
        unknown = [topic for topic in topics if topic not in MODES]
        if unknown or len(topics) > 1:
            raise UserError(f"help {' '.join(topics)}: give exactly one mode out of {', '.join(MODES)}.")
        text = help.render(help.program_name(program), *topics)
    elif asked & {"-h", "-help", "--help", "--helpfull", "--helpshort"}:
        named = [argument.removeprefix("--mode=") for argument in arguments]
        text = help.render(help.program_name(program), next((name for name in named if name in MODES), ""))
    else:
        return
    print(text, flush=True)
    sys.exit()


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
    """Returns the recipe to use if none is named: the folder recipe if training images are a folder."""
    given = dict(argument.lstrip("-").partition("=")[::2] for argument in arguments if argument.startswith("-"))
    is_folder = "images" in given or given.get("config.data.name") == "folder"
    trains = given.get("mode", "train") in ("train", "summary", "prepare", "import")
    return "folder.py" if is_folder and trains else "digits_resnet.py"


def _renamed(argument: str) -> str:
    """Returns `argument` with a deprecated field name replaced by the current one; prints a note if it was replaced."""
    flag, equals, value = argument.partition("=")
    dashes = flag[:len(flag) - len(flag.lstrip("-"))]
    old = flag.removeprefix(f"{dashes}config.")
    if not dashes or old == flag or old not in RENAMED:
        return argument
    note_renamed(f"--config.{old}", f"--config.{RENAMED[old]}")
    return f"{dashes}config.{RENAMED[old]}{equals}{value}"


def _print_notes() -> None:
    """Prints `RenamedWarning`s as one-line notes; other warnings are shown as before."""
    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        if issubclass(category, RenamedWarning):
            print(f"note: {message}", file=sys.stderr)
        else:
            others(message, category, *place, **options)

    warnings.showwarning = show


def _expand_user(value: Any) -> Any:
    """Returns a flag's value with a leading ~ expanded, which shells do not do after a =."""
    if isinstance(value, list):
        return [_expand_user(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def run(values: flags.FlagValues, options: Sequence[str]) -> None:
    """Runs the mode that the flags `values` select and prints the result; `options` are the fields of `Request`."""
    from shared_basis.cli import commands, configuration  # imported late, so that flag errors appear at once
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
    except OSError as error:  # e.g. output is redirected to a full disk
        raise UserError(f"the result cannot be written to standard output: {error.strerror}.") from error


def run_and_exit(*commands: Callable[[], None], own_process: bool = True) -> NoReturn:
    """Runs `commands`, then exits the process, or raises `SystemExit` if the process belongs to another program.

    The exit code is 0 on success; 2 after a `UserError`, which is printed as one line; 1, without a message, if the
    reader of standard output has closed it; or 128 + the signal number if interrupted (130 for Ctrl-C, 143 for SIGTERM;
    training catches both to save a checkpoint). A `SystemExit` from a command is passed on.
    """
    if own_process:
        sys.unraisablehook = lambda unraisable: None  # Orbax's abandoned I/O would print tracebacks
    code = 0
    try:
        for command in commands:
            command()
        sys.stdout.flush()
    except UserError as error:
        # Threads of a failed restore may still print tracebacks; keep them out of the message and out of the exit.
        stderr = sys.stderr
        if own_process:
            sys.stderr = io.StringIO()
        with contextlib.suppress(OSError, ValueError):  # the terminal may be closed, or the disk full
            stderr.write(f"error: {error}\n")
            stderr.flush()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        if own_process:
            os._exit(2)
        code = 2
    except BrokenPipeError:  # the reader, such as head, closed the pipe
        if own_process:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        code = 1
    except KeyboardInterrupt as interrupt:
        with contextlib.suppress(OSError, ValueError):
            print(*interrupt.args or ["stopped"], file=sys.stderr, flush=True)
        code = getattr(interrupt, "exit_code", 130)
    sys.exit(code)
