"""The benchmark of exported files: rows and tables of them, and that they agree with their runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import save_run, user_error

from benchmarks import export
from benchmarks.records import read
from benchmarks.session import SpeedRow
from shared_basis.config import Config, DataConfig, ModelConfig, replace


@pytest.mark.slow
def test_exported_files_are_measured_beside_plain_and_held_to_their_runs(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(Config(model=ModelConfig(name="resnet14-s4u1"), data=DataConfig(
        name="digits", mean=(0.3,), std=(0.38,))), {"train.eval_batch_size": 200})
    run = save_run(tmp_path / "run", config, {1: 0.5})
    export.main(["--networks=resnet14-s4u1", "--rounds=2", "--seconds=0.01", f"--workdirs={run}", "--append"],
                tmp_path)
    printed = capsys.readouterr().out
    rows = read(tmp_path / export.FILE, SpeedRow)
    sizes = {(row.network, row.subject): row.median for row in rows if row.quantity == "file (bytes)"}
    assert len(sizes) == 4  # plain, and three folds
    assert sizes["resnet14-s4u1", "export --fold=basis"] < 0.6 * sizes["resnet14", "export --fold=auto"]
    assert [row.rounds for row in rows if row.quantity == "latency (s)"] == [2] * 4
    assert [(row.network, row.batch, row.median) for row in rows if row.quantity == "predictions that differ"] == [
        ("resnet14-s4u1", 355, 0.0)] * 4
    assert "| resnet14-s4u1, composed | 355 |" in printed
    assert str(tmp_path) not in printed  # nor in results that are kept


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with user_error("unknown network 'resnet15'"):
        export.main(["--networks=resnet15"], tmp_path)
    with pytest.raises(SystemExit):
        export.main(["--rounds=0"], tmp_path)
