"""A run that commit bb59da4 wrote, stopped after step 8 of 12, is a run for this version, too."""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from pathlib import Path

import jax
import pytest

from shared_basis.evaluation.evaluate import evaluate
from shared_basis.report import run_report
from shared_basis.runs import inspect
from shared_basis.runs.workdir import Workdir
from shared_basis.runtime.reporter import Reporter
from shared_basis.training.train import train

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run-bb59da4.tar.xz"

AT_THE_END = {
    "step": 12, "epoch": 3, "learning_rate": 0.0024471760261803865, "train_loss": 2.277909994125366,
    "train_accuracy": 0.2265625, "test_loss": 2.2014780044555664, "test_accuracy": 0.1875, "test_accuracy_top5": 0.5625,
    "validation_loss": 2.219571590423584, "validation_accuracy": 0.1875, "validation_accuracy_top5": 0.6111111111111112,
    "coherence": 1.3687747716903687, "norm_max": 4.280460357666016, "norm_mean": 2.088467836380005,
    "norm_min": 1.0040282011032104, "penalty": 6.923412322998047}
"""The last line of metrics that bb59da4 wrote when it finished the run, but for the speed."""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Returns its workdir."""
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path / "old", filter="data")
    return tmp_path / "old"


def test_the_names_of_its_fields_are_translated_without_a_note(old: Path) -> None:
    saved = json.loads((old / "run.json").read_text())["config"]
    assert {"loop"} <= saved["model"].keys()
    assert {"accumulate", "decay"} <= saved["optimizer"].keys()
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        config, _ = Workdir(old).load()
    assert notes == []
    assert config.model.scan_blocks == saved["model"]["loop"]
    assert config.optimizer.grad_accumulation_steps == saved["optimizer"]["accumulate"]
    assert list(config.optimizer.weight_decay_labels) == saved["optimizer"]["decay"]


def test_it_is_evaluated_to_the_figures_that_it_wrote(old: Path) -> None:
    written = Workdir(old).metrics()[-1]
    scores = evaluate(old)
    assert scores["step"] == written["step"] == 8
    for name in ("test_loss", "test_accuracy", "test_accuracy_top5"):
        assert scores[name] == pytest.approx(written[name], rel=1e-5), name


def test_it_resumes_and_ends_as_it_did(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)  # as it was trained
    text = io.StringIO()
    result = train(Workdir(old).load()[0], old, Reporter(text))
    assert "resumes at step 8 of 12" in text.getvalue()
    assert (result["best_epoch"], result["chosen_on"]) == (3, "validation")
    lines = Workdir(old).metrics()
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert {name: lines[-1][name] for name in AT_THE_END} == pytest.approx(AT_THE_END, rel=1e-3)


@pytest.mark.slow
def test_it_is_inspected_and_reported(old: Path) -> None:
    found = inspect.inspect(old)
    assert (found["model"], found["step"]) == ("resnet14-s2u1-double", 8)
    assert {"params", "batch_stats", "opt_state"} <= found["bytes"].keys()
    assert "params/bases/group1/first" in inspect.render(found)
    result = run_report.report(old, reporter=Reporter(io.StringIO()))
    assert result["test_accuracy"] == 0.125
    assert "resnet14-s2u1-double" in Path(result["report"]).read_text()


def test_it_is_exported(old: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from shared_basis.export.export import export

    export(old, "onnx", output=str(tmp_path / "network.onnx"))
    assert (tmp_path / "network.onnx").stat().st_size > 1000
