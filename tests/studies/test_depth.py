"""Gradients against the number of layers that share: what is measured, what is not run again, what is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.common import section_of
from benchmarks.records import ROOT, append, read
from studies import depth
from studies.depth_findings import MEASURED, PAGE, TREATMENTS, DepthRow, Treatment, growth, section, table

PENALTY = next(treatment for treatment in TREATMENTS if treatment.method == "penalty")


def row(layers: int = 2, treatment: Treatment = PENALTY, seed: int = 0, epoch: int = 0, blocks: str = "4 2 9 3 1 1",
        **changes: Any) -> DepthRow:
    values: dict[str, Any] = {field.name: "" for field in dataclasses.fields(DepthRow)}
    return DepthRow(**{**values, "layers": layers, "variant": treatment.label, "seed": seed, "epoch": epoch,
                       "blocks": blocks, "train_loss": 0.5, "test_error": 4.0, "singular_min": 0.9, "singular_max": 1.1,
                       **changes})


def test_growth_is_the_mean_of_what_each_group_multiplies_by() -> None:
    assert growth(row(blocks="4 2 9 3 1 1")) == pytest.approx((2 * 3 * 1) ** (1 / 3))
    assert growth(row(blocks="8 5 2 27 9 1 64 7 1")) == pytest.approx((4 * 27 * 64) ** (1 / 3))


def test_spread_bases_keep_their_directions_and_change_their_singular_values() -> None:
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(36, 6)))[0].reshape(3, 3, 4, 6).astype(np.float32)
    spread = depth._spread(basis)
    assert spread.dtype == np.float32
    assert spread.shape == basis.shape
    assert depth._singular_values({"bases": {"group1": {"both": spread}}}) == pytest.approx((0.25, 4.0), rel=1e-5)
    both = np.concatenate([basis.reshape(36, 6), spread.reshape(36, 6)], 1)
    assert np.linalg.matrix_rank(both, tol=1e-4) == 6
    assert depth._singular_values({}) == (0, 0)


def test_the_table_tells_every_variant_and_what_was_not_run() -> None:
    rows = [row(seed=seed, epoch=epoch, blocks=blocks) for epoch in MEASURED
            for seed, blocks in enumerate(("4 1 4 1 4 1", "1 1 1 1 1 1"))]
    lines = table([*rows, row(10, TREATMENTS[0])])
    assert [line[:2] for line in lines[1:]] == [[str(layers), each.label] for layers in (2, 10) for each in TREATMENTS]
    penalty = lines[1 + TREATMENTS.index(PENALTY)]
    assert penalty[2:] == [*["2.00"] * len(MEASURED), "0.90 – 1.10", "0.500", "0.500", "4.00"]
    assert all(set(line[2:]) == {"not run"} for line in lines[1:] if line is not penalty)


def test_the_page_says_what_the_rows_say() -> None:
    rows = read(ROOT / depth.FILE, DepthRow)
    assert section(rows) == section_of(ROOT / PAGE, "depth")


def test_what_was_trained_is_not_trained_again(tmp_path: Path) -> None:
    trained = []
    (tmp_path / "docs").mkdir()
    file, page = tmp_path / depth.FILE, tmp_path / PAGE
    page.write_text("before\n<!-- depth -->\nold\n<!-- end of depth -->\nafter\n")

    def rows_of(layers: int, treatment: Treatment, seed: int) -> Iterator[DepthRow]:
        trained.append((layers, treatment.label, seed))
        return (row(layers, treatment, seed, epoch) for epoch in MEASURED)
    depth.main(["--write"], tmp_path, rows_of)
    assert "**Not run** yet" in page.read_text()
    append(file, [row(4, epoch=epoch) for epoch in MEASURED])
    depth.main(["--layers=2,4", "--seeds=1"], tmp_path, rows_of)
    assert trained == [(layers, treatment.label, 0) for layers in (2, 4) for treatment in TREATMENTS
                       if (layers, treatment) != (4, PENALTY)]
    assert len(read(file, DepthRow)) == (1 + len(trained)) * len(MEASURED)
    text = page.read_text()
    assert text.startswith("before\n<!-- depth -->\n10 runs of 12 epochs, means over 1 seed, ")
    assert text.endswith("after\n")
    assert (tmp_path / "results" / "depth.png").read_bytes().startswith(b"\x89PNG")
    more = [row(2, treatment, 1, epoch) for treatment in TREATMENTS for epoch in MEASURED]
    assert section([*read(file, DepthRow), *more]).startswith(
        "15 runs of 12 epochs, means over 2 seeds (2 layers), 1 seed (4 layers), ")


@pytest.mark.parametrize("text", ["3", "0", "2,x", ""])
def test_layers_that_no_block_has_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        depth.main([f"--layers={text}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_a_training_is_measured() -> None:
    before, after = depth.train(2, TREATMENTS[-1], 0, measured=(0, 2))
    assert (before.epoch, after.epoch, before.layers) == (0, 2, 2)
    assert before.singular_max == pytest.approx(depth.SPREAD, rel=1e-4)
    assert len(before.blocks.split()) == 6
    assert len(before.parameters.split()) == 12
    assert before.blocks != after.blocks
    assert after.train_loss > 0
