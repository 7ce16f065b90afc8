"""The command line: flags, and what becomes of mistakes. Everything else lives in `shared_basis`.

    python main.py                                                 trains the embedded default
    python main.py --config=configs/cifar_resnet.py:resnet56       another recipe and network
    python main.py --mode=evaluate --workdir=DIR                   scores a trained run
    python main.py --mode=summary --config=…                       parameters and multiply-accumulates
    python main.py --mode=prepare --config=…                       downloads and prepares a data set
    python main.py --mode=import --checkpoint=FILE.pth --config=…  published weights into a workdir
"""

import io
import json
import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from shared_basis.config import Config, check_field, from_config_dict
from shared_basis.errors import UserError

FLAGS = flags.FLAGS
_DEFAULT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", "digits_resnet.py")
_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, as FILE.py[:network]; default: digits_resnet.py.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate", "summary", "prepare", "import"], "What to do.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; default: runs/<config>-<network>.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "evaluate: latest, best, or a step; import: the file.")
_JSON = flags.DEFINE_bool("json", False, "Print the result as one JSON object; other lines go to standard error.")


def parse(argv: list[str]) -> None:
    """Parses the command line; raises `UserError` with one line for any mistake in it."""
    for argument in argv[1:]:
        name = argument.lstrip("-").split("=")[0]
        if name.startswith("config."):
            check_field(name.removeprefix("config."))
    files = [argument for argument in argv[1:] if argument.startswith(("--config=", "-config="))]
    try:  # the file comes first: the fields of the others are its own
        rest = FLAGS([argv[0], *(files or [f"--config={_DEFAULT}"]), *(arg for arg in argv[1:] if arg not in files)])
        _CONFIG.value.to_dict()  # a configuration file that is missing shows only on use
    except Exception as error:  # a configuration file is code and may raise anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(" ".join(dict.fromkeys((lines[0], lines[-1], *files[-1:])))) from error
    if rest[1:]:
        raise UserError(f"unexpected argument {rest[1]!r}; flags look like --mode=train, see --help.")


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, 2 for the user's mistake, 128 + the signal's number when stopped by one."""
    logging.set_verbosity(logging.FATAL)  # what fails is told below, in one line
    app.define_help_flags()
    try:
        parse(argv)
        from shared_basis import modes, screen  # here, so that mistakes in flags do not wait for them
        # Evaluation has the run's configuration; what is set here need suit that one alone.
        config = Config() if _MODE.value == "evaluate" else from_config_dict(_CONFIG.value)
        workdir = os.path.expanduser(_WORKDIR.value or os.path.join("runs", _CONFIG.value.name))
        result, text = modes.run(
            _MODE.value, config, workdir, workdir_given=bool(_WORKDIR.value), checkpoint=_CHECKPOINT.value,
            overrides=config_flags.get_override_values(FLAGS["config"]),
            screen=screen.Screen(sys.stderr if _JSON.value else sys.stdout))
    except UserError as error:
        # Threads of a restore that failed may still print tracebacks: not between these words.
        stderr, sys.stderr = sys.stderr, io.StringIO()
        stderr.write(f"error: {error}\n")
        stderr.flush()
        return 2
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "stopped", file=sys.stderr)
        return getattr(interrupt, "exit_code", 130)
    print(json.dumps(result) if _JSON.value else text)
    return 0


if __name__ == "__main__":
    code = main(sys.argv)
    if code == 2:  # at once: the same threads print while the interpreter shuts down
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
