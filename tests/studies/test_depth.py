"""Gradients against the number of layers that share: what is measured, what is not run again, what is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import depth
from benchmarks.depth import COLUMNS, MEASURED, VARIANTS, Row, Variant, growth, table
from benchmarks.records import append, read

PENALTY = next(variant for variant in VARIANTS if variant.method == "penalty")


def row(layers: int = 2, variant: Variant = PENALTY, seed: int = 0, epoch: int = 0, blocks: str = "4 2 9 3 1 1",
        **changes: object) -> Row:
    values = {field.name: "" for field in dataclasses.fields(Row)}
    return Row(**{**values, "layers": layers, "variant": variant.label, "seed": seed, "epoch": epoch, "blocks": blocks,
                  "train_loss": 0.5, "test_error": 4.0, "singular_min": 0.9, "singular_max": 1.1, **changes})


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
    lines = table([*rows, row(10, VARIANTS[0])])
    assert [line[:2] for line in lines[1:]] == [[str(layers), v.label] for layers in (2, 10) for v in VARIANTS]
    penalty = lines[1 + VARIANTS.index(PENALTY)]
    assert penalty[2:] == [*["2.00"] * len(MEASURED), "0.90 – 1.10", "0.500", "0.500", "4.00"]
    assert all(set(line[2:]) == {"not run"} for line in lines[1:] if line is not penalty)


def test_what_was_trained_is_not_trained_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained = []

    def train(layers: int, variant: Variant, seed: int) -> Iterator[Row]:
        trained.append((layers, variant.label, seed))
        return (row(layers, variant, seed, epoch) for epoch in MEASURED)
    monkeypatch.setattr(depth, "train", train)
    monkeypatch.setattr(depth, "FILE", tmp_path / "depth.csv")
    monkeypatch.setattr(depth, "PICTURE", tmp_path / "depth.png")
    monkeypatch.setattr(depth, "PAGE", tmp_path / "results.md")
    (tmp_path / "results.md").write_text("before\n<!-- depth -->\nold\n<!-- end of depth -->\nafter\n")
    depth.main(["--write"])
    assert "**Not run** yet" in (tmp_path / "results.md").read_text()
    append(tmp_path / "depth.csv", [row(4, epoch=epoch) for epoch in MEASURED], COLUMNS)
    assert depth.main(["--layers=2,4", "--seeds=1"]) == 0
    assert trained == [(layers, variant.label, 0) for layers in (2, 4) for variant in VARIANTS
                       if (layers, variant) != (4, PENALTY)]
    assert len(read(tmp_path / "depth.csv", Row)) == (1 + len(trained)) * len(MEASURED)
    page = (tmp_path / "results.md").read_text()
    assert page.startswith("before\n<!-- depth -->\n10 runs of 12 epochs, means over 1 seed, ")
    assert page.endswith("after\n")
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
    assert depth.main(["--layers=2", "--seeds=2"]) == 0
    assert "\n15 runs of 12 epochs, means over 2 seeds (2 layers), 1 seed (4 layers), " in (
        tmp_path / "results.md").read_text()


@pytest.mark.parametrize("text", ["3", "0", "2,x", ""])
def test_layers_that_no_block_has_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        depth.main([f"--layers={text}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_a_training_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "EPOCHS", 2)
    monkeypatch.setattr(depth, "MEASURED", (0, 2))
    before, after = depth.train(2, VARIANTS[-1], 0)
    assert (before.epoch, after.epoch, before.layers) == (0, 2, 2)
    assert before.singular_max == pytest.approx(depth.SPREAD, rel=1e-4)
    assert len(before.blocks.split()) == 6
    assert len(before.parameters.split()) == 12
    assert before.blocks != after.blocks
    assert after.train_loss > 0
