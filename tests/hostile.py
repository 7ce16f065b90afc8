"""What tests of hostile files share: reading them with little memory, and looking at what was left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import ROOT

MIB = 2**20

CHILD_MEMORY = 256 * MIB
"""What reading a small hostile file may take."""

# A process that reads files in children of its own, which may take so much memory and may crash.
_READER = """
import json, os, resource, sys
sys.path.insert(0, sys.argv[1])
from shared_basis.data.images import decode, size_of
from shared_basis.errors import UserError
from shared_basis.interop.state_dict import read_state_dict
readers = {"weights": read_state_dict, "image": lambda path: decode(path, 3, (8, 8)), "size": size_of}
while line := sys.stdin.readline():
    kind, path = json.loads(line)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[2]),) * 2)
        try:
            readers[kind](path)
            answer = "", "read"
        except UserError as error:
            answer = type(error.__cause__).__name__, str(error)
        except BaseException as error:
            answer = type(error).__name__, "no UserError"
        os.write(writing, json.dumps([answer[0], answer[1][:2000]]).encode())
        os._exit(0)
    os.close(writing)
    text = os.fdopen(reading).read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, *(json.loads(text) if text else ("", "died"))]), flush=True)
"""


class Reader:
    """Reads files in processes that may take `CHILD_MEMORY` more than nothing."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", _READER, str(ROOT), str(CHILD_MEMORY)],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def refusal(self, path: Path, kind: str = "weights") -> str:
        """Returns the message with which the file is refused: not for want of memory, and not by dying of it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([kind, str(path)]) + "\n")
        self._process.stdin.flush()
        code, cause, message = json.loads(self._process.stdout.readline())
        assert code == 0, f"reading it ended the process with {code}"
        assert cause not in ("MemoryError", "_ArrayMemoryError"), f"reading it takes the memory: {message[:200]}"
        assert message != "read", "it was read"
        assert message != "no UserError", cause
        assert "\n" not in message
        return message

    def close(self) -> None:
        self._process.communicate()


def tree(root: Path) -> dict[str, bytes]:
    """Returns what lies below `root`, by path."""
    return {str(path.relative_to(root)): os.readlink(path).encode() if path.is_symlink() else
            path.read_bytes() if path.is_file() else b"" for path in root.rglob("*")}


def spoil(path: Path, change: Callable[[Any], Any]) -> None:
    """Replaces the JSON in `path` by what `change` returns, or has made of it."""
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))
