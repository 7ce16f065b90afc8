"""README.md and docs/: commands are run, or marked with why not and parsed; what is generated is current."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from helpers import ROOT, CommandLine, save_run

from docs import generate, pictures
from shared_basis.cli.app import parse
from shared_basis.cli.commands import MODES, MODES_BY_FLAG
from shared_basis.config import from_config_dict
from shared_basis.models import create_model
from studies import published

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]


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
                    marks=[] if "--mode=summary" in arguments else [pytest.mark.slow])
       for page, mark, text in ALL if mark == "<!-- run -->" for arguments in commands(text)]
IN_ORDER = [text for page in ("docs/quickstart.md", "README.md") for name, mark, text in ALL
            if name == page and mark == "<!-- run in order -->"]
PARSED = [(page, arguments) for page, mark, text in ALL if mark.startswith(("<!-- not run: ", "<!-- run in order -->"))
          for arguments in commands(text)]


def test_every_command_is_run_or_marked_why_not() -> None:
    assert len(RUN) >= 2
    assert len(IN_ORDER) >= 2
    assert len(PARSED) >= 8
    for page, mark, _ in ALL:
        assert re.fullmatch(r"<!-- (run|run in order|not run: .+|(main|test) command) -->", mark), f"{page}: {mark!r}"


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


def without_figures(text: str) -> str:
    """Returns an output with each number as 0."""
    return re.sub(r"\d[\d,.e+-]*", "0", text)


@pytest.mark.slow
def test_commands_of_the_quick_start_and_the_readme_run_in_order(main: CommandLine, tmp_path: Path) -> None:
    """Trained for one epoch; what the pages show of their output is in it, numbers apart."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    pictures.make_photos(tmp_path)
    shutil.copytree(tmp_path / "photos", tmp_path / "newphotos")
    shutil.copytree(tmp_path / "photos" / "temple", tmp_path / "newphotos" / "roof")
    short = ("--config.train.epochs=1",)
    assert main("--config=configs/folder.py:resnet20", "--images=photos", *short, cwd=tmp_path).returncode == 0
    for text in IN_ORDER:
        output = ""
        for line in text.splitlines():
            if line.startswith("# "):  # shown up to where the page breaks it off
                shown = without_figures(line.removeprefix("# ").partition(" …")[0])
                assert shown in output, f"{line}\n{output[-600:]}"
                continue
            for arguments in commands(line):
                if not any(word.startswith("--mode") for word in arguments):
                    arguments = [word for word in arguments if "train.epochs" not in word]
                    arguments += ["--config.train.epochs=3"] if "finetune" in line else short
                arguments += ["--tolerance=100"] if "--mode=export" in arguments else []
                done = main(*arguments, cwd=tmp_path)
                assert (done.returncode, done.stderr) == (0, ""), line
                output = without_figures(done.stdout)
    example = re.search(r"<!-- use -->\n```python\n(.+?)```", (ROOT / "docs" / "quickstart.md").read_text(), re.DOTALL)
    assert example
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        exec(example[1], {})


@pytest.mark.parametrize(("page", "arguments"), PARSED, ids=[f"{page} {shlex.join(words)}" for page, words in PARSED])
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


def links(page: Path) -> list[str]:
    """Returns the targets of the links and pictures of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in map(generate.anchor, headings), target


def test_every_page_can_be_reached_from_the_readme() -> None:
    found, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        found.add(page)
        near = {(page.parent / target.partition("#")[0]).resolve() for target in links(page) if ".md" in target}
        todo += [each for each in near if each not in found and each in PAGES]
    assert found == set(PAGES)


def test_the_site_has_every_page() -> None:
    site = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in DOCS if f": {page.name}\n" not in site] == []


def test_generated_parts_are_current() -> None:
    """If not: python -m docs.generate"""
    assert generate.stale() == []


@pytest.mark.slow
def test_table_of_networks_is_current() -> None:
    """If not: python -m docs.generate"""
    assert generate.section_of(ROOT / "docs" / "networks.md", "networks") == published.table() + "\n"


def test_every_field_of_the_configuration_is_documented() -> None:
    assert "` |  |" not in generate.fields_tables()


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
