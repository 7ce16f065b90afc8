"""The figure of errors against parameters: which variants it shows, and where."""

from __future__ import annotations

import itertools
import re
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.records import ROOT, read
from shared_basis.plotting import COLORS, DARK, INK
from studies.definitions import EXACT, NO_PENALTY, STUDIES, Study, Variant
from studies.figure import IMAGES, KINDS, kind, panels, shifts, write_pictures
from studies.findings import StudyRow
from tests.studies.test_findings import row

PLAIN, NARROW = Variant("plain", "resnet20"), Variant("narrow", "resnet20w12")
SHARED, TIED = Variant("shared", "resnet20-s8u1"), Variant("tied", "resnet20-tied")
STUDY = Study("Photographs, a part of them", "Question?", "configs/digits_resnet.py", 3,
              ((PLAIN, NARROW, SHARED, TIED),))


def all_rows() -> list[StudyRow]:
    """Returns three runs of each variant; the tied network has not learned."""
    trained = ((PLAIN, 4.0, 2000), (NARROW, 6.0, 1000), (SHARED, 5.0, 1010), (TIED, 70.0, 1500))
    return [row(variant, seed, error + seed, parameters=parameters)
            for seed in range(3) for variant, error, parameters in trained]


@pytest.mark.parametrize(("variant", "number"), [
    (PLAIN, 0), (NARROW, 1), (Variant("", "shufflenetv2_x1_0w92"), 1), (Variant("", "shufflenetv2_x1_0"), 0),
    (SHARED, 2), (Variant("", "mobilenetv1-shared"), 2), (Variant("", "resnet20-s8u1", (NO_PENALTY,)), 3),
    (Variant("", "resnet20-s8u1", (EXACT,)), 4), (TIED, 5), (Variant("", "resnet20-template2"), 5)])
def test_kinds_follow_from_networks_and_settings(variant: Variant, number: int) -> None:
    assert kind(variant) == KINDS[number]


def test_a_panel_has_the_mean_and_interval_of_each_variant_with_two_runs() -> None:
    rows = [each for each in all_rows() if each.variant != "narrow" or each.seed == 0]
    (panel,) = panels({"tiny": STUDY}, {"tiny": rows})
    assert panel.title == "Photographs: resnet20"
    assert [(point.kind, point.parameters, point.error) for point in panel.points] == [
        ("plain", 2000, 5.0), ("shared", 1010, 6.0), (KINDS[5], 1500, 71.0)]
    half = 4.302653 * statistics.stdev([4, 5, 6]) / 3**0.5
    assert (panel.points[0].low, panel.points[0].high) == pytest.approx((5 - half, 5 + half), abs=1e-5)


def test_panels_of_one_study_are_told_apart_by_what_their_labels_add() -> None:
    group = tuple(Variant(f"{each.label}, rate 1.0", each.network) for each in (PLAIN, SHARED))
    study = Study("Photographs: more of them", "Question?", "configs/digits_resnet.py", 3, (group,))
    rows = [row(variant, seed, 1.0 + seed) for variant in group for seed in range(2)]
    assert [panel.title for panel in panels({"tiny": study}, {"tiny": rows})] == ["Photographs: resnet20, rate 1.0"]


def test_studies_without_a_plain_network_or_without_runs_have_no_panel() -> None:
    rows = [each for each in all_rows() if each.variant != "plain"]
    assert panels({"tiny": STUDY, "none": STUDY}, {"tiny": rows, "none": []}) == []


@given(st.lists(st.integers(1_000, 3_000), min_size=1, max_size=12))
def test_points_that_are_close_stand_side_by_side_around_their_place(parameters: list[int]) -> None:
    moved = shifts(parameters)
    for one, other in itertools.combinations(range(len(parameters)), 2):
        if parameters[one] == parameters[other]:
            assert abs(moved[one] - moved[other]) >= 1
    assert sum(moved) == pytest.approx(0)
    if max(parameters) <= 1.04 * min(parameters):
        assert sorted(moved) == [place - (len(moved) - 1) / 2 for place in range(len(moved))]
    if len(parameters) == 1:
        assert moved == [0]


def test_the_pictures_are_the_same_in_the_colours_of_both_pages(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"tiny": STUDY}, {"tiny": all_rows()})
    light, dark = ((tmp_path / IMAGES / f"results-{theme}.svg").read_text() for theme in ("light", "dark"))
    assert {INK, *COLORS[:3], COLORS[5]} <= set(re.findall("#[0-9a-f]{6}", light))
    assert not set(re.findall("#[0-9a-f]{6}", dark)) & set(DARK)
    assert re.sub("#[0-9a-f]{6}", "", light) == re.sub("#[0-9a-f]{6}", "", dark)
    again = tmp_path / "again"
    write_pictures(again, {"tiny": STUDY}, {"tiny": all_rows()})
    assert (again / IMAGES / "results-dark.svg").read_text() == dark
    write_pictures(tmp_path / "nothing", {"tiny": STUDY}, {"tiny": []})
    assert not (tmp_path / "nothing").exists()


def test_the_committed_pictures_show_the_committed_rows(tmp_path: Path) -> None:
    rows = {name: read(ROOT / "results" / f"study-{name}.csv", StudyRow) for name in STUDIES}
    write_pictures(tmp_path, STUDIES, rows)
    for theme in ("light", "dark"):
        drawn, kept = ((root / IMAGES / f"results-{theme}.svg").read_text() for root in (tmp_path, ROOT))
        versions = [re.findall(r"Matplotlib v[\d.]+", text) for text in (drawn, kept)]
        assert versions[1]
        if versions[0] != versions[1]:
            pytest.skip(f"the pictures were drawn by {versions[1][0]}")
        assert drawn == kept, "python -m studies.experiments --write"
