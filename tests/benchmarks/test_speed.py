"""The benchmark of speed: what was measured is kept. Speed itself is not tested."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import ROOT, assert_refused_in_one_line, tiny_network, user_error

from benchmarks import cases, comparison, growth, processes, session, speed, subjects, worker
from benchmarks.cases import Case
from benchmarks.common import PAGE
from benchmarks.records import read
from benchmarks.session import Session, SpeedRow
from shared_basis.errors import UserError


def make_session(**changes: Any) -> Session:
    """Returns a session that prints nothing."""
    return Session(**{"device": "cpu, 2 cores", "platform": "cpu", "command": "python -m benchmarks.speed",
                      "rounds": 1, "seconds": 0.01, "print_progress": lambda text: None, **changes})


def test_a_row_says_what_was_measured_of_what() -> None:
    one = make_session()
    assert one.add("step", Case("resnet14", 8), "seconds per step", [0.25, 0.5, 0.125]) == "0.25 (0.125 – 0.5)"
    one.add("memory", Case("resnet18", 4), "bytes", [123456789.0], framework="pytorch eager", dtype="bfloat16")
    first, second = one.rows
    assert (first.subject, first.network, first.batch, first.dtype, first.framework) == (
        "step", "resnet14", 8, "float32", "shared_basis")
    assert (first.median, first.minimum, first.maximum, first.rounds) == (0.25, 0.125, 0.5, 3)
    assert (first.command, first.device) == ("python -m benchmarks.speed", "cpu, 2 cores")
    assert (second.framework, second.dtype, second.rounds) == ("pytorch eager", "bfloat16", 1)


def test_spread_is_median_least_and_greatest() -> None:
    assert session.spread([0.3, 0.1234, 0.2], 1000) == "200 (123 – 300)"
    assert session.spread([1234.5]) == "1,234"


def test_plain_networks_come_first_and_once() -> None:
    made = [cases.make_case(name, "cpu") for name in ("resnet34-s32u1", "resnet32-s8u1", "resnet32", "resnet34-s8u1")]
    names = [[case.network for case in group] for group in cases.beside_plain(made)]
    assert names == [["resnet34", "resnet34-s32u1", "resnet34-s8u1"], ["resnet32", "resnet32-s8u1"]]


def test_comparison_divides_round_by_round() -> None:
    plain, shared = Case("resnet14", 8), Case("resnet14-s4u1", 8)
    found = comparison.Comparison(make_session(), "step", [[plain, shared]], ["pytorch channels_last"], {
        ("resnet14", "shared_basis"): [1.0, 2.0], ("resnet14-s4u1", "shared_basis"): [2.0, 2.0],
        ("resnet14", "pytorch channels_last"): [3.0, 4.0]})
    fast, plainly, absolute = found.tables("step")
    assert fast[1:] == [["resnet14, batch 8", "2.5 (2 – 3)"], ["resnet14-s4u1, batch 8", "–"]]
    assert plainly[1][:3] == ["resnet14-s4u1", "1.5 (1 – 2)", "–"]
    assert float(plainly[1][3]) == pytest.approx(shared.counts()["macs over plain"], rel=1e-2)
    assert absolute[1][1:3] == ["1,500 (1,000 – 2,000)", "3,500 (3,000 – 4,000)"]
    assert {row.quantity for row in found.session.rows} == {
        "ratio: its time over shared_basis'", "ratio: time over plain"}


@pytest.mark.slow
def test_what_does_not_work_in_pytorch_becomes_a_note() -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed; the extra 'bench' brings it", exc_type=ImportError)

    def broken(trainer: Any) -> Any:
        raise RuntimeError("no C++ compiler\nmore of it")
    found = comparison.Comparison(make_session(), "step", [[Case("resnet14", 8)], [Case("densenet121", 8)]],
                                  ["pytorch eager"])
    found.measure(lambda case: lambda: 1.0, broken)
    assert found.notes == ["resnet14, pytorch eager: does not work: RuntimeError: no C++ compiler.",
                           "densenet121 is not implemented in PyTorch here."]
    assert found.seconds == {("resnet14", "shared_basis"): [1.0], ("densenet121", "shared_basis"): [1.0]}


def test_without_pytorch_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.pytorch_trainer", None)  # as where its import fails
    monkeypatch.delattr(sys.modules["benchmarks"], "pytorch_trainer", raising=False)
    printed: list[str] = []
    found = comparison.Comparison(make_session(print_progress=printed.append), "step", [[Case("resnet14", 8)]],
                                  ["pytorch eager"])
    found.measure(lambda case: lambda: 1.0, lambda trainer: lambda: 2.0)
    assert found.seconds == {("resnet14", "shared_basis"): [1.0]}
    assert [line for line in printed if "pip install -e '.[bench]'" in line]


@pytest.mark.parametrize(("arguments", "parts"), [
    (["--subjects=speed"], ["'speed'", "step, trainer"]), (["--batch=0"], ["'0'", "positive"]),
    (["--dtype=int8"], ["int8", "bfloat16"]), (["--networks="], ["--networks"]), (["--modes=jit"],
    ["'jit'", "channels_last bf16"]), (["--rounds=many"], ["'many'"])])
def test_an_invalid_option_ends_in_one_line(arguments: Sequence[str], parts: Sequence[str],
                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused_in_one_line(speed.main, arguments, parts, capsys)


def test_an_unknown_network_is_refused_before_anything_is_measured() -> None:
    with user_error("unknown network 'resnet15'", "resnet56"):
        speed.main(["--networks=resnet15"])


def test_the_command_of_a_row_has_the_options_that_were_given() -> None:
    given = ["--subjects=step", "--networks=resnet20", "--batch=8", "--dtype=bfloat16",
             "--modes=compiled,eager", "--rounds=2", "--seconds=0.5"]
    assert speed.command(speed.parse([*given, "--append"])) == " ".join(["python -m benchmarks.speed", *given])
    assert speed.command(speed.parse([])) == "python -m benchmarks.speed --rounds=5"


def test_the_modes_of_pytorch_are_those_named_or_the_usual_ones_of_the_platform() -> None:
    named = make_session(modes=("compiled", "eager"))
    assert comparison.torch_frameworks(named, "bfloat16") == ["pytorch compiled", "pytorch eager"]
    assert comparison.torch_frameworks(make_session(modes=named.modes, platform="tpu"), "bfloat16") == []
    assert comparison.torch_frameworks(make_session(), "float32")[0] == "pytorch channels_last"
    assert "pytorch compiled bf16" in comparison.torch_frameworks(make_session(platform="gpu"), "float32")


def test_sections_of_other_subjects_are_kept(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- speed -->\n<!-- end of speed -->\nafter\n")
    speed.write(page, {"penalty": "old penalty\n"})
    speed.write(page, {"step": "a step\n"})
    speed.write(page, {"penalty": "new penalty\n"})
    assert page.read_text() == ("before\n<!-- speed -->\n<!-- speed: step -->\na step\n<!-- speed: penalty -->\n"
                                "new penalty\n<!-- end of speed -->\nafter\n")


def test_the_page_has_the_marks_and_names_every_subject_and_option() -> None:
    text = (ROOT / PAGE).read_text()
    for name in ("speed", "data", "export"):
        assert text.count(f"<!-- {name} -->\n") == text.count(f"<!-- end of {name} -->\n") == 1
    described = text[:text.index("<!-- speed -->\n")]
    for subject in speed.SUBJECTS:
        assert f"*{subject}*" in described
    for option in ("subjects", "networks", "batch", "dtype", "rounds", "seconds", "append", "write"):
        assert f"`--{option}" in described


def test_plain_networks_have_no_penalty_to_measure() -> None:
    part = subjects.penalty(make_session(), [Case("resnet14", 8)])
    assert (part.tables, part.notes) == ([], ["No network here has a basis."])


@pytest.mark.slow
def test_bare_step_begins_anew_each_time() -> None:
    made = cases.make_step(Case("resnet14", 4), tiny_network())
    before = jax.device_get(made.state())
    assert made.run(2) > 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(made.state()), before)


@pytest.mark.slow
def test_trainer_and_evaluator_are_measured() -> None:
    alone = make_session()
    (table,) = subjects.trainer(alone, [Case("resnet14-s4u1", 8)]).tables
    rows = {row.quantity: row for row in alone.rows}
    assert rows["images/s"].median > 0
    assert rows["ratio: images/s over bare step"].median == pytest.approx(
        rows["images/s"].median / rows["images/s of the bare step"].median)
    assert table[1][0] == "resnet14-s4u1, batch 8"
    alone = make_session(platform="tpu")  # where PyTorch is not measured
    plainly, absolute = subjects.evaluation(alone, [Case("resnet14-s4u1", 8, eval_batch=24)]).tables
    assert [row.batch for row in alone.rows] == [24] * len(alone.rows)
    assert (plainly[1][0], absolute[1][0]) == ("resnet14-s4u1", "resnet14, batch 24")
    seconds = {(row.network, row.quantity): row.median for row in alone.rows}
    assert seconds["resnet14", "images/s"] == pytest.approx(24 / seconds["resnet14", "seconds per batch"], rel=1)


@pytest.mark.slow
def test_growth_is_measured_and_drawn(tmp_path: Path) -> None:
    picture, found = tmp_path / "growth.png", make_session()
    part = growth.growth(found, [Case("resnet14-s4u1", 8), Case("resnet20-s4u1", 8)], picture, widths=(1, 3),
                         batches=(1, 2), devices=(1, 2))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "growth.png" in part.notes[0]
    rows = {row[0]: row[1:] for row in part.tables[0]}
    assert list(rows) == ["growth by", "depth: 14", "depth: 20", "width: 1", "width: 3", "batch: 8", "batch: 16",
                          "devices: 1", "devices: 2"]
    assert rows["batch: 16"][3] == "2"  # MACs
    assert 6 < float(rows["width: 3"][3]) < 9  # the first layer sees three channels whatever the width
    assert rows["devices: 1"][:5] == ["s4u1", "1", "1", "1", "1"]
    assert float(rows["devices: 2"][4]) < 1  # memory of each
    assert {row.device for row in found.rows if row.subject == "growth by devices"} == {
        f"{count} virtual devices on cpu, 2 cores" for count in (1, 2)}


@pytest.mark.slow
def test_first_step_is_seen_on_the_terminal() -> None:
    pytest.importorskip("pty", reason="there are no such terminals here")
    script = ("import time; print('0 images/s before'); print('ready in 0:00:01', flush=True); time.sleep(0.3); "
              "print('epoch 1/1 loss 2 0 images/s', flush=True); time.sleep(0.5)")
    first, whole = processes.first_step([sys.executable, "-c", script], {})
    assert 0.3 < first < whole - 0.4
    with user_error("exit code 3", "no such thing"):
        processes.first_step([sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"], {})


@pytest.mark.slow
def test_memory_of_a_process_is_its_own() -> None:
    """On Linux getrusage would say the memory of this process, which has started the other one."""
    code = "from benchmarks.worker import resident_bytes as b; print(b('VmRSS'), b('VmHWM'))"
    large = np.ones(2**29, np.uint8)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    now, peak = map(int, done.stdout.split())
    assert 2**24 < now <= peak < large.nbytes
    assert worker.resident_bytes("VmRSS") > large.nbytes


@pytest.mark.slow
def test_penalty_is_measured_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / PAGE
    page.parent.mkdir()
    page.write_text("<!-- speed -->\n<!-- end of speed -->\n")
    speed.main(["--subjects=penalty", "--networks=resnet14-s4u1-double", "--batch=8", "--rounds=1", "--seconds=0.01",
                "--append", "--write"], tmp_path)
    printed = capsys.readouterr().out
    assert printed.startswith("### Penalty\n\n`python -m benchmarks.speed --subjects=penalty "
                              "--networks=resnet14-s4u1-double --batch=8 --rounds=1 --seconds=0.01`, ")
    assert printed.strip() in page.read_text()
    rows = {row.quantity: row for row in read(tmp_path / speed.FILE, SpeedRow)}
    assert {row.network for row in rows.values()} == {"resnet14-s4u1-double"}
    whole, alone = (rows[name].median for name in ("seconds per step", "seconds of the gradient alone"))
    assert 0 < alone < whole
    assert rows["ratio: gradient alone over step"].median == pytest.approx(alone / whole, rel=1)
    assert rows["ratio: exact orthogonality alone over step"].median > 0
    assert rows["seconds per step"].rounds == 3
    assert str(tmp_path) not in (tmp_path / speed.FILE).read_text()


def test_a_file_of_other_rows_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / speed.FILE).write_text("date,who\n")
    with pytest.raises(UserError, match="date, who"):
        speed.main(["--append"], tmp_path)
