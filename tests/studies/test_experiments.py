"""Studies: which runs are made, which are not made again, and what the tables say of them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks import experiments
from benchmarks.findings import (
    COLUMNS,
    Row,
    difference,
    interval,
    mean_and_deviation,
    overview,
    paired,
    section,
    table,
    verdicts,
)
from benchmarks.records import append, read
from benchmarks.studies import STUDIES, Hypothesis, Study, Variant
from shared_basis.config import Config
from shared_basis.errors import UserError
from shared_basis.models import create_model

PLAIN, SHARED = Variant("plain", "resnet20"), Variant("shared", "resnet20-s8u1", ("--config.seed_of_all=1",))
STUDY = Study("Title", "Question?", "configs/digits_resnet.py", 2, ((PLAIN, SHARED),), ("--config.train.epochs=3",))


def row(variant: Variant, seed: int, error: float, **changes: Any) -> Row:
    values = {field.name: "" for field in dataclasses.fields(Row)}
    return Row(**{**values, "variant": variant.label, "network": variant.network, "seed": seed, "final_error": error,
                  "best_error": error - 0.5, "parameters": 1000, "macs": 2000, "wall_seconds": 90.0, "epochs": 3,
                  "best_epoch": 2, "images_per_second": 5.0, "date": "2026-11-24", **changes})


@pytest.mark.parametrize("name", STUDIES)
def test_every_variant_is_a_network_and_settings_that_exist(name: str) -> None:
    study = STUDIES[name]
    labels = [variant.label for variant in study.variants]
    assert len(set(labels)) == len(labels)
    for variant in study.variants:
        create_model(variant.network)
        for setting in (*study.settings, *variant.settings):
            field = setting.removeprefix("--config.").partition("=")[0]
            section_of, _, last = field.partition(".")
            assert hasattr(getattr(Config(), section_of), last), setting


def test_a_row_comes_back_from_its_file(tmp_path: Path) -> None:
    rows = [row(PLAIN, 0, 1.25), row(SHARED, 1, 12.3457, penalty="1e-05", settings="a, b\"c")]
    for each in rows:
        append(tmp_path / "results" / "x.csv", [each], COLUMNS)
    assert read(tmp_path / "results" / "x.csv", Row) == rows
    assert read(tmp_path / "absent.csv", Row) == []


def test_contrasts_are_paired_by_seed_and_those_not_run_are_left_out() -> None:
    study = dataclasses.replace(STUDY, contrasts=(("plain", "shared"), ("shared", "plain")))
    rows = [row(PLAIN, seed, 10.0 + seed) for seed in range(3)] + [row(SHARED, seed, 9.0 + seed) for seed in range(3)]
    assert paired(study, rows, study.contrasts)[1:] == [["plain → shared", "-1.00 [-1.00, -1.00] better"],
                                          ["shared → plain", "+1.00 [+1.00, +1.00] worse"]]
    assert "| plain → shared | -1.00" in section("name", study, rows)
    assert paired(study, rows[:3], study.contrasts)[1:] == []
    level = [row(SHARED, seed, 10.0 + seed - 1e-12 * (seed - 1)) for seed in range(3)]
    assert paired(study, rows[:3] + level, study.contrasts)[1][1].startswith("+0.00 [+0.00, +0.00]")


def test_the_overview_tells_what_leaves_0_out_from_noise_and_from_what_nobody_ran() -> None:
    study = dataclasses.replace(STUDY, contrasts=(("plain", "shared"), ("shared", "plain")))
    rows = [row(PLAIN, seed, 10.0 + seed) for seed in range(2)]
    apart = rows + [row(SHARED, seed, 9.0 + seed) for seed in range(2)]
    noise = rows + [row(SHARED, seed, 10.0 - seed) for seed in range(2)]
    studies = dict.fromkeys(("apart", "noise", "half", "absent"), study)
    assert overview(studies, {"apart": apart, "noise": noise, "half": rows, "absent": []})[1:] == [
        ["Title", "4 of 4", "plain → shared: -1.00 [-1.00, -1.00] better; shared → plain: +1.00 [+1.00, +1.00] worse",
         "0 of 2"],  # the first is a contrast and one from the first of the group, and told once
        ["Title", "4 of 4", "none", "2 of 2"],
        ["Title", "2 of 4", "none", "0 of 0"], ["Title", "not run", "–", "–"]]


def test_the_documentation_says_what_the_rows_say() -> None:
    for page, mark, text in experiments.pages():
        assert f"<!-- {mark} -->\n{text}<!-- end of {mark} -->" in page.read_text(), mark


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_contrasts_and_hypotheses_are_of_variants(study: Study) -> None:
    labels = {variant.label for variant in study.variants}
    assert {label for pair in study.contrasts for label in pair} <= labels
    assert {label for each in study.hypotheses for label in (each.variant, each.reference)} <= labels


def test_hypotheses_are_judged_by_the_interval_and_their_margin() -> None:
    study = dataclasses.replace(STUDY, seeds=3, hypotheses=(
        Hypothesis("within half a point", "shared", "plain", 0.5), Hypothesis("better", "shared", "plain")))
    plain = [row(PLAIN, seed, 10.0) for seed in range(3)]

    def outcomes(*errors: float) -> list[str]:
        return [line[-1] for line in verdicts(study, plain + [row(SHARED, i, e) for i, e in enumerate(errors)])[1:]]
    assert outcomes(10.19, 10.2, 10.21) == ["confirmed", "refuted"]
    assert outcomes(9.8, 9.79, 9.81) == ["confirmed", "confirmed"]
    assert outcomes(11.0, 11.01, 10.99) == ["refuted", "refuted"]
    assert outcomes(9.0, 11.0, 10.0) == ["not decided (within noise)"] * 2
    assert outcomes(9.8, 9.81) == ["confirmed, by 2 of 3 seeds"] * 2
    assert outcomes(9.8) == ["too few runs"] * 2
    assert outcomes() == ["not run"] * 2
    assert "| better | -0.20 (one seed) | too few runs |" in section("name", study, [*plain, row(SHARED, 0, 9.8)])


def test_a_stop_ends_the_running_process_and_begins_no_further_one(tmp_path: Path) -> None:
    children = experiments.Children()
    began = tmp_path / "began"
    script = f"import pathlib, time; pathlib.Path({str(began)!r}).touch(); time.sleep(60)"
    with ThreadPoolExecutor() as threads:
        running = threads.submit(children.run, [sys.executable, "-c", script], dict(os.environ))
        while not began.exists() and not running.done():
            time.sleep(0.05)
        children.stop(signal.SIGTERM, None)
        assert running.result()[0] == -signal.SIGTERM
    assert experiments.run_study("tiny", STUDY, experiments.parse(["--study=digits"])[1], children) == 0


@pytest.mark.parametrize(("text", "message"), [
    ("a,b\n1,2\n", "x.csv has the columns a, b; ours have"), (",".join(COLUMNS) + "\n" + "x," * 25 + "x\n", "line 2")])
def test_rows_that_are_none_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "x.csv", Row)


def test_means_deviations_and_paired_intervals_by_hand() -> None:
    assert mean_and_deviation([1.0, 2.0, 4.5]) == f"2.50 ± {statistics.stdev([1, 2, 4.5]):.2f} (3)"
    assert mean_and_deviation([2.0]) == "2.00 (1)"
    # Differences 1, 2, 3: mean 2, standard error 1/√3, and t(0.975; 2) = 4.302653.
    mean, low, high = interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)


def test_differences_are_paired_by_seed_and_judged_by_their_interval() -> None:
    reference = {seed: row(PLAIN, seed, 10.0 * seed) for seed in range(4)}
    better = {seed: row(SHARED, seed, 10.0 * seed - 1 + 0.1 * (seed % 2)) for seed in range(1, 6)}
    assert difference(better, reference) == "-0.93 [-1.08, -0.79] better"
    worse = {seed: row(SHARED, seed, 10.0 * seed + 1 + 0.1 * (seed % 2)) for seed in range(4)}
    assert difference(worse, reference).endswith("worse")
    noise = {seed: row(SHARED, seed, 10.0 * seed + (-1) ** seed) for seed in range(4)}
    assert difference(noise, reference).endswith("]")
    assert difference({9: row(SHARED, 9, 1.0)}, reference) == "–"


def test_the_table_has_what_was_run_and_what_was_not() -> None:
    rows = [row(PLAIN, seed, 2.0 + seed) for seed in (0, 1)]
    head, plain, shared = table(STUDY, rows)
    assert len(head) == len(plain) == len(shared)
    assert plain == ["plain", "1,000", "2,000", "2.50 ± 0.71 (2)", "2.00 ± 0.71 (2)", "–", "–", "–", "1.5"]
    assert shared[:2] == ["shared", "not run"]
    with_bases = row(SHARED, 0, 1.5, penalty="0.01", norm_min="0.9", norm_max="1.25")
    assert table(STUDY, [*rows, with_bases, dataclasses.replace(with_bases, seed=1, norm_max="1.5")])[2] == [
        "shared", "1,000", "2,000", "1.50 ± 0.00 (2)", "1.00 ± 0.00 (2)", "-1.00 [-7.35, +5.35]", "1.0e-02",
        "0.90 – 1.50", "1.5"]


def test_published_figures_stand_beside_comparable_runs_alone() -> None:
    lines = {line[0]: line[-1] for line in table(STUDIES["cifar10"], [])}
    assert lines["variant"] == "published, %"
    assert lines["R32-S16U1*"] == "6.93"
    assert lines["R32-S16U1*, no penalty"] == "–"
    assert "published" not in str(table(STUDIES["cifar300"], [])[0])


def test_a_study_that_nobody_ran_says_so() -> None:
    assert "**Not run** yet: `python benchmarks/experiments.py --study=cifar60 --images=DIR`" in section(
        "cifar60", STUDIES["cifar60"], [])


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Returns the calls of main.py, none of which is made: runs of seed 1 of the shared network fail."""
    calls: list[list[str]] = []

    def call(_: Any, words: list[str], __: Any) -> tuple[int, str, str]:
        calls.append(words[2:])
        if "--config.seed=1" in words and any(word.endswith("-s8u1") for word in words):
            return 2, "", "noise\nerror: no luck\n"
        return 0, json.dumps({
            "epoch": 3, "device": "1 × cpu", "parameters": 5, "macs": 6, "images_per_second": 7.0,
            "test_accuracy": 0.9, "best_test_accuracy": 0.95, "best_epoch": 2, "chosen_on": "test"}), ""
    monkeypatch.setattr(experiments.Children, "run", call)
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    monkeypatch.setattr(experiments, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(experiments, "README", tmp_path / "README.md")
    monkeypatch.setattr(experiments, "STUDIES", {"tiny": STUDY})
    (tmp_path / "README.md").write_text("<!-- studies -->\n<!-- end of studies -->\n")
    (tmp_path / "results.md").write_text("before\n<!-- study: tiny -->\nold\n<!-- end of study: tiny -->\nafter\n")
    return calls


def test_runs_what_has_no_row_and_goes_on_after_a_failure(study: list[list[str]], tmp_path: Path) -> None:
    append(tmp_path / "study-tiny.csv", [row(PLAIN, 0, 12.0)], COLUMNS)
    assert experiments.main(["--study=tiny", "--workdirs=w"]) == 1
    assert [(words[0].partition(":")[2], words[1]) for words in study] == [
        ("resnet20-s8u1", "--config.seed=0"), ("resnet20", "--config.seed=1"), ("resnet20-s8u1", "--config.seed=1")]
    assert all(word in study[0] for word in ("--config.train.epochs=3", "--config.seed_of_all=1", "--json"))
    assert len({word for words in study for word in words if word.startswith("--workdir=w/tiny/")}) == 3
    rows = read(tmp_path / "study-tiny.csv", Row)
    assert [(each.variant, each.seed, each.final_error) for each in rows] == [
        ("plain", 0, 12.0), ("shared", 0, 10.0), ("plain", 1, 10.0)]
    assert "--workdir" not in rows[1].command
    page = (tmp_path / "results.md").read_text()
    assert page.startswith("before\n<!-- study: tiny -->\n## Title")
    assert page.endswith("after\n")
    assert "old" not in page
    assert "| plain | 1,000 |" in page
    assert "| Title | 3 of 4 |" in (tmp_path / "README.md").read_text()
    assert experiments.main(["--study=tiny", "--workdirs=w"]) == 1
    assert len(study) == 4  # the failed one alone


def test_a_study_can_take_other_seeds_than_an_earlier_one(study: list[list[str]],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "STUDIES", {"tiny": dataclasses.replace(STUDY, first_seed=3)})
    assert experiments.main(["--study=tiny"]) == 0
    assert [words[1] for words in study] == [f"--config.seed={seed}" for seed in (3, 3, 4, 4)]


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "name a --study (tiny)"), (["--study=tiny", "--seeds=0"], "'0' is not a positive whole number"),
    (["--study=tiny", "--variants=absent"], "none of plain, shared")])
def test_mistakes_end_in_one_line(arguments: list[str], message: str, study: list[list[str]],
                                  capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        experiments.main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not study


def test_a_study_of_images_wants_their_directory(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        experiments.main(["--study=cifar60"])
    assert "needs --images=DIR" in capsys.readouterr().err
