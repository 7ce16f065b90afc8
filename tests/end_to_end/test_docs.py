"""The commands and examples of README.md and docs/: each is run, or is marked with why not and at least understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from helpers import ROOT, CommandLine, save_run

from shared_basis.cli.app import parse
from shared_basis.cli.commands import MODES, MODES_BY_FLAG
from shared_basis.config import from_config_dict
from shared_basis.models import create_model

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[tuple[str, str]]:
    """Returns the shell blocks of a page, each with the line before it."""
    return re.findall(r"([^\n]*)\n```sh\n(.+?)\n```", page.read_text(), re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Returns the arguments of each call of main.py within a shell block."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:^|\s)(?:\.venv/bin/)?python main\.py(.*?)(?:\"?\s*$)", re.sub(r"\s+#.*", "", line))
             for line in lines]
    return [shlex.split(match[1]) for match in found if match]


ALL = [(page.relative_to(ROOT).as_posix(), mark, text) for page in PAGES for mark, text in blocks(page)]
RUN = [pytest.param(page, arguments, id=f"{page} {shlex.join(arguments)}",
                    marks=[] if page == "README.md" else [pytest.mark.slow])
       for page, mark, text in ALL if mark == "<!-- run -->" for arguments in commands(text)]
NOT_RUN = [(page, arguments) for page, mark, text in ALL if mark.startswith("<!-- not run: ")
           for arguments in commands(text)]


def test_every_command_is_run_or_marked_why_not() -> None:
    assert len(RUN) >= 2
    assert len(NOT_RUN) >= 8
    for page, mark, _ in ALL:
        assert re.fullmatch(r"<!-- (run|not run: .+|(main|test) command) -->", mark), f"{page}: {mark!r}"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a directory with the recipes, and a run as the main command leaves it, though not trained."""
    from configs import digits_resnet
    root = tmp_path_factory.mktemp("checkout")
    (root / "configs").symlink_to(ROOT / "configs")
    save_run(root / "runs" / "digits_resnet-resnet20-s8u1-double", from_config_dict(digits_resnet.get_config()),
             {22: 0.5, 44: 0.25})
    return root


@pytest.mark.parametrize(("page", "arguments"), RUN)
def test_command_runs(page: str, arguments: list[str], main: CommandLine, checkout: Path) -> None:
    done = main(*arguments, cwd=checkout)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(("page", "arguments"), NOT_RUN, ids=[f"{page} {shlex.join(words)}" for page, words in NOT_RUN])
@pytest.mark.filterwarnings("default::shared_basis.errors.RenamedWarning")
def test_a_command_that_is_not_run_is_understood(page: str, arguments: list[str],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    values, options = parse(["main.py", *arguments])
    for name in options:
        assert not values[name].present or values.mode in MODES_BY_FLAG.get(name, MODES), f"--{name}: {values.mode}"
    if values.config.data.name == "folder":
        values.config.data.directory = "DIR"  # of --images, or of the run
    assert create_model(from_config_dict(values.config).model.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize(("page", "code"), [
    (page.relative_to(ROOT).as_posix(), code) for page in PAGES
    for code in re.findall(r"<!-- run: [^\n]+ -->\n```python\n(.+?)```", page.read_text(), re.DOTALL)])
def test_example_runs(page: str, code: str) -> None:
    scope: dict = {}
    exec(code, scope)
    if "penalty" in scope:
        assert abs(float(scope["penalty"])) < 1e-9


def test_every_public_name_is_documented() -> None:
    import inspect

    import shared_basis
    for name in shared_basis.__all__:
        item = getattr(shared_basis, name)
        assert inspect.getdoc(item), name
