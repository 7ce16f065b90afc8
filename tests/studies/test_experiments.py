"""Studies: which runs are made, which are not made again, and where rows and pages are kept."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.records import read
from shared_basis.errors import UserError
from studies import experiments
from studies.definitions import Study, Variant
from studies.findings import GLANCE, StudyRow

STUDY = Study("Title", "Question?", "configs/digits_resnet.py", 2, ((
    Variant("plain", "resnet20"), Variant("shared", "resnet20-s8u1", ("--config.seed_of_all=1",))),),
    ("--config.train.epochs=3",))

MAIN = """
import json, sys
words = sys.argv[1:]
with open("calls.jsonl", "a") as file:
    file.write(json.dumps(words) + "\\n")
if "--config.seed=1" in words and words[0].endswith("-s8u1"):
    sys.exit("noise\\nerror: no luck")
print(json.dumps({
    "epoch": 3, "device": "1 × cpu", "parameters": 5, "macs": 6, "images_per_second": 7.0, "test_accuracy": 0.9,
    "best_test_accuracy": 0.95, "best_epoch": 2, "chosen_on": "test", **({} if words[0].endswith(":resnet20") else {
        "penalty": 0.5, "norm_min": 0.9, "norm_mean": 1.0, "norm_max": 1.1, "coherence": 0.2})}))
"""
"""In place of main.py: notes how it was called; runs of seed 1 of the shared network fail."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Returns a repository of that main.py and three pages."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "main.py").write_text(MAIN)
    (tmp_path / "README.md").write_text("<!-- results -->\n<!-- end of results -->\n")
    networks = "".join(f"| {data} | `{name}` | 1,500,000 | 25.0 % | 2,000,000 | -10.4 % | 5 |\n"
                       for data, name in GLANCE)
    (tmp_path / "docs" / "networks.md").write_text(f"<!-- networks -->\n{networks}<!-- end of networks -->\n")
    (tmp_path / "docs" / "results.md").write_text(
        "before\n<!-- studies -->\n<!-- end of studies -->\n"
        "<!-- study: tiny -->\nold\n<!-- end of study: tiny -->\nafter\n")
    return tmp_path


def calls(root: Path) -> list[list[str]]:
    """Returns the arguments of each call of main.py."""
    file = root / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run(root: Path, *arguments: str, study: Study = STUDY) -> int:
    """Returns the exit code."""
    return experiments.main(["--study=tiny", *arguments], root, {"tiny": study})


def test_runs_what_has_no_row_and_goes_on_after_a_failure(root: Path) -> None:
    assert run(root, "--workdirs=w", "--variants=plain", "--seeds=1") == 0
    assert run(root, "--workdirs=w") == 1
    made = calls(root)
    assert [(words[0].partition(":")[2], words[1]) for words in made] == [
        ("resnet20", "--config.seed=0"), ("resnet20-s8u1", "--config.seed=0"), ("resnet20", "--config.seed=1"),
        ("resnet20-s8u1", "--config.seed=1")]
    assert {"--config.train.epochs=3", "--config.seed_of_all=1", "--json"} <= set(made[1])
    assert len({word for words in made for word in words if word.startswith("--workdir=w/tiny/")}) == 4
    rows = read(root / "results" / "study-tiny.csv", StudyRow)
    assert [(each.variant, each.seed, each.final_error, each.penalty) for each in rows] == [
        ("plain", 0, 10.0, ""), ("shared", 0, 10.0, "0.5"), ("plain", 1, 10.0, "")]
    assert rows[0].commit == "unknown"
    assert "--workdir" not in rows[1].command
    page = (root / "docs" / "results.md").read_text()
    assert "<!-- study: tiny -->\n## Title" in page
    assert page.endswith("after\n")
    assert "old" not in page
    assert "| plain | 5 |" in page
    assert "| Title | 3 of 4 |" in page
    assert "1.5M | -25 % | 2M | +10 % | 5 | not run |" in (root / "README.md").read_text()
    assert run(root, "--workdirs=w") == 1
    assert len(calls(root)) == 5  # the failed one alone


def test_a_study_can_take_other_seeds_than_an_earlier_one(root: Path) -> None:
    assert run(root, "--variants=plain", study=dataclasses.replace(STUDY, first_seed=3)) == 0
    assert [words[1] for words in calls(root)] == ["--config.seed=3", "--config.seed=4"]


def test_a_stop_ends_the_running_process_and_begins_no_further_one(tmp_path: Path) -> None:
    children = experiments.Children(tmp_path)
    began = tmp_path / "began"
    script = f"import pathlib, time; pathlib.Path({str(began)!r}).touch(); time.sleep(60)"
    with ThreadPoolExecutor() as threads:
        running = threads.submit(children.run, [sys.executable, "-c", script], dict(os.environ))
        while not began.exists() and not running.done():
            time.sleep(0.05)
        children.stop(signal.SIGTERM, None)
        assert running.result()[0] == -signal.SIGTERM
    assert experiments.run_study("tiny", STUDY, experiments.parse(["--study=tiny"], {"tiny": STUDY}), children) == 0


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "give --study (tiny)"), (["--study=tiny", "--seeds=0"], "'0' is not a positive whole number")])
def test_an_invalid_option_ends_in_one_line(arguments: list[str], message: str, root: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        experiments.main(arguments, root, {"tiny": STUDY})
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_options_that_do_not_fit_the_study_are_refused(root: Path) -> None:
    with pytest.raises(UserError, match="none of plain, shared"):
        run(root, "--variants=absent")
    with pytest.raises(UserError, match="needs --images=DIR"):
        run(root, study=dataclasses.replace(STUDY, needs_images=True))
    assert not calls(root)


def test_a_study_of_images_hands_their_directory_on_and_keeps_it_out_of_the_row(root: Path) -> None:
    run(root, f"--images={root}", "--variants=plain", "--seeds=1", study=dataclasses.replace(STUDY, needs_images=True))
    assert f"--config.data.directory={root}" in calls(root)[0]
    assert str(root) not in (root / "results" / "study-tiny.csv").read_text()


def test_a_page_without_marks_is_left_alone(root: Path) -> None:
    (root / "docs" / "results.md").write_text("<!-- end of study: tiny -->\n<!-- study: tiny -->\n")
    with pytest.raises(UserError, match="lacks the marks"):
        experiments.main(["--write"], root, {"tiny": STUDY})
    assert (root / "docs" / "results.md").read_text() == "<!-- end of study: tiny -->\n<!-- study: tiny -->\n"
