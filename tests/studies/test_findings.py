"""What studies are defined as, how rows are judged, and that the documentation says what the rows say."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import pytest

from shared_basis.config import Config
from shared_basis.models import create_model
from studies import experiments
from studies.definitions import STUDIES, Hypothesis, Study, Variant
from studies.findings import (
    StudyRow,
    difference,
    interval,
    mean_and_deviation,
    overview,
    paired,
    section,
    table,
    verdicts,
)

PLAIN, SHARED = Variant("plain", "resnet20"), Variant("shared", "resnet20-s8u1", ("--config.seed_of_all=1",))
STUDY = Study("Title", "Question?", "configs/digits_resnet.py", 2, ((PLAIN, SHARED),), ("--config.train.epochs=3",))


def row(variant: Variant, seed: int, error: float, **changes: Any) -> StudyRow:
    values = {field.name: "" for field in dataclasses.fields(StudyRow)}
    return StudyRow(**{**values, "variant": variant.label, "network": variant.network, "seed": seed,
                       "final_error": error, "best_error": error - 0.5, "parameters": 1000, "macs": 2000,
                       "wall_seconds": 90.0, "epochs": 3, "best_epoch": 2, "images_per_second": 5.0,
                       "date": "2026-11-24", **changes})


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_a_study_is_of_networks_settings_and_labels_that_exist(study: Study) -> None:
    labels = [variant.label for variant in study.variants]
    assert len(set(labels)) == len(labels)
    assert {label for pair in study.contrasts for label in pair} <= set(labels)
    assert {label for each in study.hypotheses for label in (each.variant, each.reference)} <= set(labels)
    for variant in study.variants:
        create_model(variant.network)
        for setting in (*study.settings, *variant.settings):
            field = setting.removeprefix("--config.").partition("=")[0]
            section_of, _, last = field.partition(".")
            assert hasattr(getattr(Config(), section_of), last), setting


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
    text = section("cifar60", STUDIES["cifar60"], [])
    assert "**Not run** yet: `python -m studies.experiments --study=cifar60 --images=DIR`" in text


def test_a_run_that_a_later_one_replaces_is_named_and_counts_nowhere() -> None:
    rows = [row(PLAIN, 0, 9.0, device="1 × cpu", commit="abc", date="2026-11-20"), row(PLAIN, 0, 2.0, device="1 × gpu")]
    text = section("name", STUDY, rows)
    assert "1 run of 3 epochs, 2026-11-24, 1 × gpu," in text
    assert "Earlier runs that are replaced by these: plain, seed 0: 9.00 % on 1 × cpu, commit abc.\n" in text
    assert "| plain | 1,000 | 2,000 | 2.00 (1) |" in text
    assert "replaced" not in section("name", STUDY, rows[1:])
    assert "replaced" not in section("name", STUDY, [row(Variant("of earlier", "resnet20"), 0, 9.0), rows[1]])
    assert "**Not run** yet" in section("name", STUDY, [row(Variant("of earlier", "resnet20"), 0, 9.0)])
