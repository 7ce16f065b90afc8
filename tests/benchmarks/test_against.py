"""Steps of two commits side by side: refusals, and that the earlier tree is the one measured."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from benchmarks import against, speed
from benchmarks.common import PAGE
from benchmarks.records import read
from benchmarks.session import SpeedRow
from shared_basis.errors import UserError


def git(*words: str) -> str:
    """Returns what git prints in the repository; skips where that is no repository."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def test_an_unknown_commit_is_refused_and_leaves_no_worktree() -> None:
    before = git("worktree", "list")
    with pytest.raises(UserError, match=r"'no-such-commit' cannot be checked out: .*no-such-commit"):
        against.main(["no-such-commit", "--networks=resnet14"])
    assert git("worktree", "list") == before


def test_an_unknown_network_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="resnet15"):
        against.main(["HEAD", "--networks=resnet15"], tmp_path)


@pytest.mark.slow
def test_both_trees_are_measured_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    before = git("worktree", "list")
    opened = []
    popen = subprocess.Popen

    def spy(words: list[str], **options: Any) -> Any:
        if "-c" in words:
            opened.append(options["cwd"])
        return popen(words, **options)
    monkeypatch.setattr(against.subprocess, "Popen", spy)
    page = tmp_path / PAGE
    page.parent.mkdir()
    page.write_text("<!-- against HEAD -->\n<!-- end of against HEAD -->\n")
    against.main(["HEAD", "--networks=resnet14", "--rounds=3", "--seconds=0.01", "--append", "--write"], tmp_path)
    assert capsys.readouterr().out.strip() in page.read_text()
    assert (opened[0], opened[1].name) == (ROOT, "tree")
    assert not opened[1].exists()
    assert git("worktree", "list") == before
    rows = {(row.framework, row.quantity): row for row in read(tmp_path / speed.FILE, SpeedRow)}
    ours, theirs = (rows[name, "milliseconds per step"] for name in ("shared_basis", "HEAD"))
    ratio = rows["shared_basis", "ratio: step over HEAD's"]
    assert ours.rounds == theirs.rounds == ratio.rounds == 3
    assert ours.minimum / theirs.maximum * 0.999 <= ratio.median <= ours.maximum / theirs.minimum * 1.001


def test_missing_marks_are_reported_before_the_measurement(tmp_path: Path) -> None:
    page = tmp_path / PAGE
    page.parent.mkdir()
    page.write_text("<!-- against bb59da4 -->\n<!-- end of against bb59da4 -->\n")
    with pytest.raises(UserError, match="lacks the marks <!-- against HEAD -->"):
        against.main(["HEAD", "--networks=resnet14", "--write"], tmp_path)
