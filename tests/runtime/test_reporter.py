"""What a run shows: plain lines where there is no terminal, one progress line that comes and goes where there is."""

from __future__ import annotations

import io
import pathlib
import re
import time

import pytest
from rich.console import Console

from shared_basis.runtime.reporter import PLAIN_INTERVAL, Reporter, count, duration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Returns the monotonic time that a reporter sees, as a list of one value to be changed."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def terminal(width: int = 100, verbosity: str = "normal") -> tuple[Reporter, io.StringIO]:
    """Returns a reporter on a terminal, and what is written to that."""
    written = io.StringIO()
    shown = Reporter(written, verbosity)
    # Rich takes a StringIO for no terminal, and some environments (CI, TERM=dumb) for another one.
    shown._console = Console(file=written, highlight=False, markup=False, soft_wrap=True, force_terminal=True,
                             width=width, _environ={"TERM": "xterm"})
    return shown, written


def test_lines_come_out_whole_and_unchanged_without_a_terminal() -> None:
    written = io.StringIO()
    text = "resnet20 [bold]not markup[/bold] [1, 2] " + "long " * 100 + "× λ 12 %"
    with Reporter(written) as shown:
        shown.info(text)
    assert written.getvalue() == text + "\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_letters_that_the_encoding_lacks_are_escaped(encoding: str, tmp_path: pathlib.Path) -> None:
    raw = io.BytesIO()
    with Reporter(io.TextIOWrapper(raw, encoding)) as shown, shown.logging(tmp_path):
        shown.info("λ 12 × 日")
    expected = {"ascii": r"\u03bb 12 \xd7 \u65e5", "latin-1": r"\u03bb 12 × \u65e5", "utf-8": "λ 12 × 日"}[encoding]
    assert raw.getvalue().decode(encoding) == expected + "\n"
    assert "λ 12 × 日" in (tmp_path / "log.txt").read_text(encoding="utf-8")


class Failing(io.StringIO):
    """A stream that takes a line, and then fails as one that nobody reads, or whose disk or terminal is gone."""

    def __init__(self, error: Exception, tty: bool) -> None:
        super().__init__()
        self.error, self.tty = error, tty

    def isatty(self) -> bool:
        return self.tty

    def write(self, text: str) -> int:
        if "\n" in self.getvalue():
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space"), ValueError("closed file")], ids=repr)
@pytest.mark.parametrize("tty", [False, True])
def test_what_cannot_be_printed_ends_nothing_and_is_logged(
        error: Exception, tty: bool, clock: list[float], monkeypatch: pytest.MonkeyPatch,
        tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Failing(error, tty)
    with Reporter(stream) as shown, shown.logging(tmp_path):
        for line in ("one", "two"):
            shown.info(line)
        clock[0] += PLAIN_INTERVAL
        shown.show_progress(1, 2, "half")
        shown.end_progress()
        shown.info("three")
    assert stream.getvalue() == "one\n"
    assert [line.split(": ")[1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["one", "two", "three"]


def test_where_standard_output_is_closed_the_log_goes_on(monkeypatch: pytest.MonkeyPatch,
                                                         tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr("sys.stdout", None)
    with Reporter() as shown, shown.logging(tmp_path):
        shown.info("line")
    assert (tmp_path / "log.txt").read_text().endswith(": line\n")


def test_plain_progress_comes_at_most_once_a_minute(clock: list[float]) -> None:
    written = io.StringIO()
    with Reporter(written) as shown:
        for second in range(int(3.5 * PLAIN_INTERVAL)):
            clock[0] = 1000.0 + second
            shown.show_progress(second, 1000, f"step {second}")
    assert written.getvalue().splitlines() == ["step 60", "step 120", "step 180"]


def test_no_control_characters_without_a_terminal(clock: list[float]) -> None:
    written = io.StringIO()
    with Reporter(written) as shown:
        clock[0] += PLAIN_INTERVAL
        shown.show_progress(1, 2, "half")
        shown.info("line")
        shown.end_progress()
    assert written.getvalue() == "half\nline\n"


def test_a_terminal_shows_progress_at_once_and_in_one_place() -> None:
    shown, written = terminal()
    with shown:
        for step in (1, 2):
            shown.show_progress(step, 2, f"step {step} [of 2]")
            shown._progress.refresh()  # a thread does it ten times a second
        drawn = written.getvalue()
        assert "step 1 [of 2]" in drawn
        assert "step 2 [of 2]" in drawn
        assert "\n" not in drawn
        assert "\x1b[2K" in drawn  # the line is erased before it is drawn again


def test_a_line_is_printed_above_the_progress_line() -> None:
    shown, written = terminal()
    with shown:
        shown.show_progress(1, 2, "working")
        shown._progress.refresh()
        before = len(written.getvalue())
        shown.info("epoch 1 [done]")
        after = written.getvalue()[before:]
    assert "epoch 1 [done]\n" in after
    assert "working" in after[after.index("epoch 1 [done]\n"):]


def test_the_progress_line_is_gone_when_the_reporter_is_left() -> None:
    shown, written = terminal()
    with shown:
        shown.show_progress(1, 2, "working")
        # The cursor, which Rich hides, is visible: Ctrl-C may end the process at any moment.
        assert written.getvalue().rindex("\x1b[?25h") > written.getvalue().rindex("\x1b[?25l")
    assert written.getvalue().endswith("\x1b[1A\x1b[2K")  # up to the progress line, and erased
    shown.end_progress()  # again, harmlessly


def test_progress_may_begin_again_after_its_end() -> None:
    shown, written = terminal()
    with shown:
        shown.show_progress(1, 2, "first")
        shown.end_progress()
        shown.show_progress(2, 2, "second")
    assert "second" in written.getvalue()


def test_counting_shows_how_many_and_the_time_left(clock: list[float]) -> None:
    shown, written = terminal()
    with shown:
        count_images = shown.progress("decoding [images]")
        clock[0] += 10
        count_images(1000, 4000)
        shown._progress.refresh()
        assert "decoding [images]  1,000/4,000  0:00:30 left" in written.getvalue()
        clock[0] += 100
        count_images(0, 4000)  # begins only now
        clock[0] += 4
        count_images(2000, 4000)
        shown._progress.refresh()
        assert "2,000/4,000  0:00:04 left" in written.getvalue()
        count_images(4000, 4000)
        assert shown._progress is None  # done: the line is gone


@pytest.mark.parametrize(("verbosity", "expected"), [
    ("quiet", "warning: w\n"), ("normal", "l\nwarning: w\n"),
    ("verbose", "[process 1 step 7] l\n[process 1 step 7] d\n[process 1 step 7] warning: w\n")])
def test_what_is_printed_by_verbosity(verbosity: str, expected: str) -> None:
    written = io.StringIO()
    shown = Reporter(written, verbosity, process=1)
    shown.step = 7
    shown.info("l")
    shown.debug("d")
    shown.warn("w")
    assert written.getvalue() == expected


def test_a_quiet_terminal_shows_no_progress() -> None:
    shown, written = terminal(verbosity="quiet")
    with shown:
        shown.show_progress(1, 2, "working")
    assert not written.getvalue()


def test_an_unknown_verbosity_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of quiet, normal, verbose"):
        Reporter(verbosity="loud")


LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} (.+)")


def logged(path: pathlib.Path) -> list[str]:
    """Returns the lines of a log without their times."""
    return [LINE.fullmatch(line)[1] for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_log_has_each_line_with_time_process_and_step(tmp_path: pathlib.Path) -> None:
    shown = Reporter(io.StringIO(), "quiet")
    shown.info("before there is a directory")
    with shown.logging(tmp_path):
        shown.step = 3
        shown.info("three")
        shown.debug("shown by none, and so not logged")
        assert logged(tmp_path / "log.txt")[-1] == "process 0 step 3: three"  # at once, not at the end
        shown.warn("× λ")
    shown.info("after")
    with pytest.raises(KeyError), shown.logging(tmp_path):
        raise KeyError("what ends it")
    assert logged(tmp_path / "log.txt") == [
        "process 0 step 0: before there is a directory", "process 0 step 3: three", "process 0 step 3: warning: × λ",
        "process 0 step 3: after", "process 0 step 3: ended: 'what ends it'"]


def test_other_processes_have_logs_of_their_own(tmp_path: pathlib.Path) -> None:
    shown = Reporter(io.StringIO(), process=2)
    with shown.logging(tmp_path):
        shown.info("here")
    assert logged(tmp_path / "log-2.txt") == ["process 2 step 0: here"]


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: pathlib.Path) -> None:
    written = io.StringIO()
    shown = Reporter(written)
    (tmp_path / "log.txt").mkdir()
    with shown.logging(tmp_path):
        shown.info("one")
    (tmp_path / "log.txt").rmdir()
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with shown.logging(tmp_path):
        shown.info("two")
    assert written.getvalue() == "one\ntwo\n"


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0:00:00"), (59.4, "0:00:59"), (59.6, "0:01:00"), (3661, "1:01:01")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (999.6, "1,000"), (1234567, "1,234,567")])
def test_count(number: float, text: str) -> None:
    assert count(number) == text
