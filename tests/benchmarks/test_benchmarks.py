"""The benchmarks: what is compared is the same network, and what was measured is kept. Speed itself is not tested."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import ROOT, save_run, tiny_network, user_error

sys.path.insert(0, str(ROOT))  # pytest, called as such, does not look there

from benchmarks import cases, common, comparison, growth, processes, records, speed, subjects, worker
from benchmarks.cases import Case
from benchmarks.records import COLUMNS, Session
from shared_basis.config import Config, DataConfig, ModelConfig, replace
from shared_basis.evaluation import evaluate
from shared_basis.models import create_model
from shared_basis.models.parameters import abstract_variables
from shared_basis.optim.penalty import orthogonality_penalty

NETWORKS = (
    *(f"resnet{depth}{form}" for depth in (14, 18, 34) for form in ("", "-s8u1", "-s8u1-double")),
    *(f"resnet{depth}{form}" for depth in (20, 32, 44, 56, 110) for form in ("", "-s16u1-double")),
    "resnet14-s8u0", "resnet14-s0u8", "resnet18-s8u0", "resnet18-s0u8", "resnet34-s32u1",
    "resnet50", "resnet50-shared", "resnet50-shared++", "mobilenetv2", "mobilenetv2-shared", "mobilenetv2-shared++")


@pytest.fixture
def networks() -> Any:
    """The networks in PyTorch."""
    pytest.importorskip("torch", reason="PyTorch is not installed; the extra 'bench' brings it", exc_type=ImportError)
    from benchmarks import pytorch_networks
    return pytorch_networks


def torch_name(path: tuple[str, ...]) -> str:
    """Returns the name in PyTorch of the variable at `path`."""
    leaves = {"kernel": "weight", "unique": "unique.weight", "coefficients": "coefficients.weight", "bias": "bias",
              "scale": "weight", "mean": "running_mean", "var": "running_var"}
    if path[0] == "bases":
        return ".".join((*path, "weight"))
    modules = {"shortcut": "shortcut.0", "shortcut_norm": "shortcut.1"}
    parts = [modules.get(part, part) for part in path[:-1]]
    return ".".join(str(int(part[5:]) - 1) if part.startswith("block") else part for part in (*parts, leaves[path[-1]]))


def torch_layout(array: np.ndarray, name: str) -> np.ndarray:
    """Returns an array of ours as PyTorch has it: [T, C, k, k] and [T, C]."""
    if array.ndim == 2 and name.endswith("coefficients.weight"):
        return array.T[:, :, None, None]
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def copy(variables: Any, network: Any) -> None:
    """Copies all our variables into a network of PyTorch, each of whose tensors is filled by one of them."""
    import torch

    owned = {**dict(network.named_parameters()), **{name: tensor for name, tensor in network.named_buffers()
                                                    if not name.endswith("num_batches_tracked")}}
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
        name = torch_name(tuple(entry.key for entry in path[1:]))
        with torch.no_grad():
            owned.pop(name).copy_(torch.from_numpy(np.array(torch_layout(np.asarray(leaf), name))))
    assert not owned


def random_variables(model: Any) -> Any:
    """Returns variables as after some training: batch statistics are not the initial ones, nor are biases."""
    random = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key in ("scale", "bias", "mean", "var"):
            return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return random.standard_normal(leaf.shape, np.float32) / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
    return jax.tree_util.tree_map_with_path(draw, dict(abstract_variables(model, (32, 32, 3))))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_pytorch_have_as_many_parameters(networks: Any, name: str) -> None:
    import torch

    case = cases.make_case(name, "cpu")
    model = create_model(name, num_classes=case.classes, stem=case.stem)
    ours = sum(leaf.size for leaf in jax.tree.leaves(abstract_variables(model, (32, 32, 3))["params"]))
    with torch.device("meta"):  # has shapes and no numbers
        theirs = networks.create(name, case.classes, case.stem, case.elements)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == ours


@pytest.mark.parametrize(("name", "stem", "size"), [
    ("resnet14-s4u1-double", "cifar", 16), ("resnet18", "cifar", 16),
    *(pytest.param(name, "imagenet", 40, marks=pytest.mark.slow)
      for name in ("resnet18-s8u2", "resnet50-shared++", "mobilenetv2-shared++"))])
def test_networks_in_pytorch_compute_the_same(networks: Any, name: str, stem: str, size: int) -> None:
    import torch

    elements = "shared+unique" if "14" in name else "shared"
    model, theirs = create_model(name, stem=stem), networks.create(name, 10, stem, elements)
    variables = random_variables(model)
    copy(variables, theirs)
    images = np.random.default_rng(1).standard_normal((3, size, size, 3), np.float32)
    expected = np.asarray(jax.jit(lambda x: model.apply(variables, x, train=False))(images))
    with torch.inference_mode():
        logits = theirs.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
        penalty = float(networks.orthogonality_penalty(theirs))
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    sets = model.basis_groups(elements)
    assert penalty == pytest.approx(float(orthogonality_penalty(variables["params"], sets)) if sets else 0, rel=1e-4)


def test_what_is_not_written_in_pytorch_is_said(networks: Any) -> None:
    for name, stem in (("densenet121", "cifar"), ("resnet20-tied", "cifar"), ("mobilenetv2", "cifar")):
        with user_error(name, "not written in PyTorch"):
            networks.create(name, 10, stem, "shared")


def test_steps_in_pytorch_train_and_each_measurement_begins_anew(networks: Any) -> None:
    import torch

    torch.manual_seed(0)
    network = networks.create("resnet14-s4u1", 10, "cifar", "shared")
    trainer = networks.Trainer(network, networks.VARIANTS["eager"], 4, 8)
    first = float(trainer.loss().detach())
    assert trainer.run(5) > 0
    assert float(trainer.loss().detach()) < first
    after = {name: tensor.clone() for name, tensor in trainer.network.named_parameters()}
    trainer.run(5)
    assert all(torch.equal(after[name], tensor) for name, tensor in trainer.network.named_parameters())
    assert trainer.evaluate(trainer.images, trainer.labels) > 0


def test_bare_step_begins_anew_each_time() -> None:
    made = cases.make_step(Case("resnet14", 4), tiny_network())
    before = jax.device_get(made.state())
    assert made.run(2) > 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(made.state()), before)


def test_in_turns_calls_subjects_in_turns() -> None:
    calls: list[str] = []

    def subject(name: str) -> Callable[[], float]:
        return lambda: calls.append(name) or float(len(calls))  # type: ignore[func-returns-value]
    found = common.in_turns({"a": subject("a"), "b": subject("b")}, 3)
    assert calls == ["a", "b"] * 3
    assert found == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert common.medians(found) == {"a": 3, "b": 4}


def test_markdown_has_numbers_to_the_right() -> None:
    assert common.markdown([["a", "b"], ["c", "1"]]) == "| a | b |\n| --- | ---: |\n| c | 1 |\n"


def test_spread_is_median_least_and_greatest() -> None:
    assert records.spread([0.3, 0.1234, 0.2], 1000) == "200 (123 – 300)"
    assert records.spread([1234.5]) == "1,234"


def session(**changes: Any) -> Session:
    """Returns a session that prints nothing."""
    return Session(**{"device": "cpu, 2 cores", "platform": "cpu", "command": "python benchmarks/speed.py, as said",
                      "rounds": 1, "tell": lambda text: None, **changes})


def test_appending_keeps_the_rows_that_are_there(tmp_path: Path) -> None:
    file, one = tmp_path / "results" / "speed.csv", session()
    one.add("step", Case("resnet14", 8), "seconds per step", [0.25, 0.5, 0.125])
    records.append(file, one.rows)
    before = file.read_text()
    one.rows.clear()
    one.add("memory", Case("resnet18", 4), "bytes", [123456789.0], framework="pytorch channels_last", dtype="bfloat16")
    records.append(file, one.rows)
    assert file.read_text().startswith(before)
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert tuple(rows[0]) == COLUMNS
    assert [row["subject"] for row in rows] == ["step", "memory"]
    assert rows[0]["framework"] == "shared_basis"
    assert [rows[0][name] for name in ("median", "minimum", "maximum", "rounds")] == ["0.25", "0.125", "0.5", "3"]
    assert rows[0]["command"] == "python benchmarks/speed.py, as said"
    assert (rows[1]["median"], rows[1]["dtype"]) == ("123456789", "bfloat16")


def test_appending_mends_a_missing_end_of_line(tmp_path: Path) -> None:
    file, one = tmp_path / "speed.csv", session()
    one.add("step", Case("resnet14", 8), "seconds per step", [1.0])
    records.append(file, one.rows)
    file.write_text(file.read_text().rstrip("\n"))
    records.append(file, one.rows)
    assert len(file.read_text().splitlines()) == 3


def test_a_file_of_other_columns_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "speed.csv"
    file.write_text("date,who\n2026-01-01,me\n")
    with user_error("speed.csv", "date, who", "quantity"):
        records.append(file, session().rows)
    assert file.read_text() == "date,who\n2026-01-01,me\n"


def test_commit_says_which_files_were_measured() -> None:
    assert re.fullmatch(r"[0-9a-f]{7,}\+?|unknown", records.commit())


def test_plain_networks_come_first_and_once() -> None:
    made = [cases.make_case(name, "cpu") for name in ("resnet34-s32u1", "resnet32-s8u1", "resnet32", "resnet34-s8u1")]
    names = [[case.network for case in group] for group in cases.beside_plain(made)]
    assert names == [["resnet34", "resnet34-s32u1", "resnet34-s8u1"], ["resnet32", "resnet32-s8u1"]]


def test_comparison_divides_round_by_round() -> None:
    plain, shared = Case("resnet14", 8), Case("resnet14-s4u1", 8)
    found = comparison.Comparison(session(), "step", [[plain, shared]], ["pytorch channels_last"], {
        ("resnet14", "shared_basis"): [1.0, 2.0], ("resnet14-s4u1", "shared_basis"): [2.0, 2.0],
        ("resnet14", "pytorch channels_last"): [3.0, 4.0]})
    fast, plainly, absolute = found.tables("step")
    assert fast[1:] == [["resnet14, batch 8", "2.5 (2 – 3)"], ["resnet14-s4u1, batch 8", "–"]]
    assert plainly[1][:3] == ["resnet14-s4u1", "1.5 (1 – 2)", "–"]
    assert float(plainly[1][3]) == pytest.approx(shared.counts()["macs over plain"], rel=1e-2)
    assert absolute[1][1:3] == ["1,500 (1,000 – 2,000)", "3,500 (3,000 – 4,000)"]
    assert {row.quantity for row in found.session.rows} == {
        "ratio: its time over shared_basis'", "ratio: time over plain"}


def test_what_does_not_work_in_pytorch_becomes_a_note(networks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, *_: Any) -> None:
            raise RuntimeError("no C++ compiler\nmore of it")
    monkeypatch.setattr(networks, "Trainer", Broken)
    found = comparison.Comparison(session(), "step", [[Case("resnet14", 8)]], ["pytorch compiled"])
    found.measure(lambda case: lambda: 1.0, lambda trainer: lambda: 2.0)
    assert found.notes == ["resnet14, pytorch compiled: does not work: RuntimeError: no C++ compiler."]
    assert found.seconds == {("resnet14", "shared_basis"): [1.0]}


def test_without_pytorch_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "benchmarks.pytorch_networks", raising=False)
    monkeypatch.delattr(sys.modules["benchmarks"], "pytorch_networks", raising=False)
    told: list[str] = []
    found = comparison.Comparison(session(tell=told.append), "step", [[Case("resnet14", 8)]], ["pytorch eager"])
    found.measure(lambda case: lambda: 1.0, lambda trainer: lambda: 2.0)
    assert found.seconds == {("resnet14", "shared_basis"): [1.0]}
    assert [line for line in told if "pip install -e '.[bench]'" in line]


@pytest.mark.parametrize(("arguments", "parts"), [
    (["--subjects=speed"], ["'speed'", "step, trainer"]), (["--batch=0"], ["'0'", "positive"]),
    (["--dtype=int8"], ["int8", "bfloat16"]), (["--networks=resnet15"], ["unknown network 'resnet15'", "resnet56"]),
    (["--networks="], ["--networks"]), (["--rounds=many"], ["'many'"]), (["now"], ["now"])])
def test_mistakes_end_in_one_line(arguments: Sequence[str], parts: Sequence[str],
                                  capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        speed.main(arguments)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert all(part in err for part in parts)


def test_sections_of_other_subjects_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- speed -->\n<!-- end of speed -->\nafter\n")
    monkeypatch.setattr(speed, "README", readme)
    speed.write({"penalty": "old penalty\n"})
    speed.write({"step": "a step\n"})
    speed.write({"penalty": "new penalty\n"})
    assert readme.read_text() == ("before\n<!-- speed -->\n<!-- speed: step -->\na step\n<!-- speed: penalty -->\n"
                                  "new penalty\n<!-- end of speed -->\nafter\n")


def test_readme_has_the_marks_and_names_every_subject_and_option() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    for mark in (speed.BEGIN, speed.END, "<!-- data -->\n", "<!-- end of data -->\n"):
        assert text.count(mark) == 1
    assert text.index(speed.BEGIN) < text.index(speed.END)
    described = text[:text.index(speed.BEGIN)]
    for subject in speed.SUBJECTS:
        assert f"*{subject}*" in described
    for option in ("subjects", "networks", "batch", "dtype", "rounds", "append", "write"):
        assert f"`--{option}" in described


@pytest.mark.slow
def test_trainer_and_evaluator_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cases, evaluate):
        monkeypatch.setattr(module, "build_model", lambda config, spec: tiny_network(len(spec.classes)))
    monkeypatch.setattr(cases, "SECONDS", 0.01)
    monkeypatch.setattr(subjects, "torch_frameworks", lambda platform, dtype: [])
    alone = session()
    (table,) = subjects.trainer(alone, [Case("resnet14-s4u1", 8)]).tables
    rows = {row.quantity: row for row in alone.rows}
    assert rows["images/s"].median > 0
    assert rows["ratio: images/s over bare step"].median == pytest.approx(
        rows["images/s"].median / rows["images/s of the bare step"].median)
    assert table[1][0] == "resnet14-s4u1, batch 8"
    alone.rows.clear()
    plainly, absolute = subjects.evaluation(alone, [Case("resnet14-s4u1", 8, eval_batch=24)]).tables
    assert [row.batch for row in alone.rows] == [24] * len(alone.rows)
    assert (plainly[1][0], absolute[1][0]) == ("resnet14-s4u1", "resnet14, batch 24")
    seconds = {(row.network, row.quantity): row.median for row in alone.rows}
    assert seconds["resnet14", "images/s"] == pytest.approx(24 / seconds["resnet14", "seconds per batch"], rel=1)


@pytest.mark.slow
def test_growth_is_measured_and_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for module in (cases, growth):
        monkeypatch.setattr(module, "build_model", lambda config, spec: tiny_network(len(spec.classes)))
    monkeypatch.setattr(cases, "SECONDS", 0.01)
    monkeypatch.setattr(growth, "WIDTHS", (1, 3))
    monkeypatch.setattr(growth, "BATCHES", (1, 2))
    monkeypatch.setattr(growth, "ask", lambda task, case, environment: {"seconds": 2.0, "program": 2**20})
    picture = tmp_path / "growth.png"
    found = session()
    part = growth.growth(found, [Case("resnet14-s4u1", 8), Case("resnet20-s4u1", 8)], picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "growth.png" in part.notes[0]
    rows = {row[0]: row[1:] for row in part.tables[0]}
    assert list(rows) == ["growth by", "depth: 14", "depth: 20", "width: 1", "width: 3", "batch: 8", "batch: 16",
                          "devices: 1", "devices: 2", "devices: 4"]
    assert rows["batch: 16"][3] == "2"  # MACs
    assert 6 < float(rows["width: 3"][3]) < 9  # the first layer sees three channels whatever the width
    assert rows["devices: 4"] == ["s4u1", "1", "1", "1", "1", "2,000", "1"]
    assert {row.device for row in found.rows if row.subject == "growth by devices"} == {
        f"{count} virtual devices on cpu, 2 cores" for count in (1, 2, 4)}


def test_plain_networks_have_no_penalty_to_measure() -> None:
    part = subjects.penalty(session(), [Case("resnet14", 8)])
    assert (part.tables, part.notes) == ([], ["No network here has a basis."])


def test_first_step_is_seen_on_the_terminal() -> None:
    pytest.importorskip("pty", reason="there are no such terminals here")
    script = ("import time; print('0 images/s before'); print('ready in 0:00:01', flush=True); time.sleep(0.3); "
              "print('epoch 1/1 loss 2 0 images/s', flush=True); time.sleep(0.5)")
    first, whole = processes.first_step([sys.executable, "-c", script], {})
    assert 0.3 < first < whole - 0.4
    with user_error("exit code 3", "no such thing"):
        processes.first_step([sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"], {})


def test_memory_of_a_process_is_its_own() -> None:
    """On Linux getrusage would say the memory of this process, which has started the other one."""
    code = "from benchmarks.worker import resident_bytes as b; print(b('VmRSS'), b('VmHWM'))"
    large = np.ones(2**29, np.uint8)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    now, peak = map(int, done.stdout.split())
    assert 2**24 < now <= peak < large.nbytes
    assert worker.resident_bytes("VmRSS") > large.nbytes


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_penalty_is_measured_from_the_command_line(real: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    """Of the network itself, and of one that compiles fast under its name."""
    if not real:
        monkeypatch.setattr(cases, "build_model", lambda config, spec: tiny_network(len(spec.classes)))
        monkeypatch.setattr(subjects, "create_model", lambda name, num_classes, **_: tiny_network(num_classes))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- speed -->\n<!-- end of speed -->\n")
    monkeypatch.setattr(speed, "README", readme)
    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    monkeypatch.setattr(cases, "SECONDS", 0.01)
    monkeypatch.setattr(processes, "ask", lambda task: worker.device())
    speed.main(["--subjects=penalty", "--networks=resnet14-s4u1-double", "--batch=8", "--rounds=1", "--append",
                "--write"])
    printed = capsys.readouterr().out
    assert printed.startswith("### Penalty\n\n`python benchmarks/speed.py --subjects=penalty "
                              "--networks=resnet14-s4u1-double --batch=8 --rounds=1`, ")
    assert printed.strip() in readme.read_text()
    with (tmp_path / "speed.csv").open(newline="") as file:
        rows = {row["quantity"]: row for row in csv.DictReader(file)}
    assert {row["network"] for row in rows.values()} == {"resnet14-s4u1-double"}
    whole, alone = (float(rows[name]["median"]) for name in ("seconds per step", "seconds of the gradient alone"))
    assert 0 < alone < whole
    assert float(rows["ratio: gradient alone over step"]["median"]) == pytest.approx(alone / whole, rel=1)
    assert float(rows["ratio: exact orthogonality alone over step"]["median"]) > 0
    assert rows["seconds per step"]["rounds"] == "3"
    assert str(tmp_path) not in (tmp_path / "speed.csv").read_text()


def test_exported_files_are_measured_beside_plain_and_held_to_their_runs(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; the extra 'export' brings it")
    from benchmarks import export
    config = replace(Config(model=ModelConfig(name="resnet14-s4u1"), data=DataConfig(
        name="digits", mean=(0.3,), std=(0.38,))), {"train.eval_batch_size": 200})
    run = save_run(tmp_path / "run", config, {1: 0.5})
    monkeypatch.setattr(export, "FILE", tmp_path / "export.csv")
    monkeypatch.setattr(cases, "SECONDS", 0.01)
    export.main(["--networks=resnet14-s4u1", "--rounds=2", f"--workdirs={run}", "--append"])
    printed = capsys.readouterr().out
    with (tmp_path / "export.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    sizes = {(row["network"], row["subject"]): float(row["median"]) for row in rows
             if row["quantity"] == "file (bytes)"}
    assert len(sizes) == 4  # plain, and three folds
    assert sizes["resnet14-s4u1", "export --fold=basis"] < 0.6 * sizes["resnet14", "export --fold=auto"]
    latencies = [row for row in rows if row["quantity"] == "latency (s)"]
    assert [row["rounds"] for row in latencies] == ["2"] * 4
    differing = [row for row in rows if row["quantity"] == "predictions that differ"]
    assert [(row["network"], row["batch"], float(row["median"])) for row in differing] == [
        ("resnet14-s4u1", "355", 0.0)] * 4
    assert "| resnet14-s4u1, composed | 355 |" in printed
    assert str(tmp_path) not in printed  # nor in results that are kept
    for wrong in ("--networks=resnet15", "--rounds=0"):
        with pytest.raises(SystemExit):
            export.main([wrong])
