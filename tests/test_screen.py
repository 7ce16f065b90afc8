"""What a run shows: plain lines where there is no terminal, one progress line that comes and goes where there is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from shared_basis import screen as screen_module
from shared_basis.screen import PLAIN_INTERVAL, Screen, count, duration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Returns the monotonic time that `screen` sees, as a list of one value to be changed."""
    now = [1000.0]
    monkeypatch.setattr(screen_module.time, "monotonic", lambda: now[0])
    return now


def terminal(width: int = 100) -> tuple[Screen, io.StringIO]:
    """Returns a screen on a terminal, and what is written to that."""
    written = io.StringIO()
    shown = Screen(written)
    # Rich takes a StringIO for no terminal, and some environments (CI, TERM=dumb) for another one.
    shown._console = Console(file=written, highlight=False, markup=False, soft_wrap=True, force_terminal=True,
                             width=width, _environ={"TERM": "xterm"})
    return shown, written


def test_lines_come_out_whole_and_unchanged_without_a_terminal() -> None:
    written = io.StringIO()
    text = "resnet20 [bold]not markup[/bold] [1, 2] " + "long " * 100 + "× λ 12 %"
    with Screen(written) as shown:
        shown.line(text)
    assert written.getvalue() == text + "\n"


def test_plain_progress_comes_at_most_once_a_minute(clock: list[float]) -> None:
    written = io.StringIO()
    with Screen(written) as shown:
        for second in range(int(3.5 * PLAIN_INTERVAL)):
            clock[0] = 1000.0 + second
            shown.progress(second, 1000, f"step {second}")
    assert written.getvalue().splitlines() == ["step 60", "step 120", "step 180"]


def test_no_control_characters_without_a_terminal(clock: list[float]) -> None:
    written = io.StringIO()
    with Screen(written) as shown:
        clock[0] += PLAIN_INTERVAL
        shown.progress(1, 2, "half")
        shown.line("line")
        shown.end_progress()
    assert written.getvalue() == "half\nline\n"


def test_a_terminal_shows_progress_at_once_and_in_one_place() -> None:
    shown, written = terminal()
    with shown:
        for step in (1, 2):
            shown.progress(step, 2, f"step {step} [of 2]")
            shown._progress.refresh()  # a thread does it ten times a second
        drawn = written.getvalue()
        assert "step 1 [of 2]" in drawn
        assert "step 2 [of 2]" in drawn
        assert "\n" not in drawn
        assert "\x1b[2K" in drawn  # the line is erased before it is drawn again


def test_a_line_is_printed_above_the_progress_line() -> None:
    shown, written = terminal()
    with shown:
        shown.progress(1, 2, "working")
        shown._progress.refresh()
        before = len(written.getvalue())
        shown.line("epoch 1 [done]")
        after = written.getvalue()[before:]
    assert "epoch 1 [done]\n" in after
    assert "working" in after[after.index("epoch 1 [done]\n"):]


def test_the_progress_line_is_gone_when_the_screen_is_left() -> None:
    shown, written = terminal()
    with shown:
        shown.progress(1, 2, "working")
        assert "\x1b[?25l" in written.getvalue()  # the cursor is hidden
    assert written.getvalue().endswith("\x1b[1A\x1b[2K")  # up to the progress line, and erased
    assert written.getvalue().count("\x1b[?25h") == 1
    shown.end_progress()  # again, harmlessly


def test_progress_may_begin_again_after_its_end() -> None:
    shown, written = terminal()
    with shown:
        shown.progress(1, 2, "first")
        shown.end_progress()
        shown.progress(2, 2, "second")
    assert "second" in written.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0:00:00"), (59.4, "0:00:59"), (59.6, "0:01:00"), (3661, "1:01:01")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (999.6, "1,000"), (1234567, "1,234,567")])
def test_count(number: float, text: str) -> None:
    assert count(number) == text
