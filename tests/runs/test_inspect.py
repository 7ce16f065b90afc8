"""What a run holds, against what was saved, and with plain Orbax alone."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import ROOT, assert_trees_equal, save_run, user_environment, user_error

from shared_basis.config import Config, ModelConfig, replace
from shared_basis.models import create_model
from shared_basis.models.parameters import abstract_variables
from shared_basis.runs import inspect

CONFIG = replace(Config(model=ModelConfig(name="resnet14-s4u1-double")), {"train.batch_size": 16})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "one", CONFIG, {3: 0.5, 7: 0.75, 9: 0.25})


def test_tells_all_that_was_saved(run: Path) -> None:
    found = inspect.inspect(run)
    assert found["model"] == "resnet14-s4u1-double"
    assert found["changed"]["train.batch_size"] == 16
    assert "train.epochs" not in found["changed"]
    assert found["config"]["train"]["epochs"] == CONFIG.train.epochs
    assert [(entry["step"], entry["metrics"]["test_accuracy"]) for entry in found["checkpoints"]] == [
        (7, 0.75), (9, 0.25)]  # the best one and the latest two are kept
    for entry in found["checkpoints"]:
        files = [path for path in (run / "checkpoints" / str(entry["step"])).rglob("*") if path.is_file()]
        assert entry["bytes"] == sum(path.stat().st_size for path in files) > 0
    shapes = abstract_variables(create_model("resnet14-s4u1-double"), (8, 8, 1))
    expected = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
                for path, leaf in jax.tree_util.tree_leaves_with_path(dict(shapes))}
    arrays = {array["path"]: array for array in found["arrays"]}
    assert arrays.pop("step")["bytes"] == 4
    assert arrays.keys() == expected.keys()
    for path, leaf in expected.items():
        assert (arrays[path]["shape"], arrays[path]["dtype"]) == (list(leaf.shape), "float32")
        assert arrays[path]["bytes"] == 4 * leaf.size
    assert found["bytes"]["params"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    json.dumps(found)  # raises unless it is plain data


def test_reads_no_array(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import orbax.checkpoint as ocp

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an array is read")
    for reader in (ocp.PyTreeCheckpointHandler, ocp.StandardCheckpointHandler):
        monkeypatch.setattr(reader, "restore", refuse)
    assert inspect.inspect(run)["arrays"]


@pytest.mark.parametrize(("which", "step"), [("latest", 9), ("best", 7), ("7", 7)])
def test_describes_the_checkpoint_that_is_asked_for(run: Path, which: str, step: int) -> None:
    found = inspect.inspect(run, which)
    assert found["step"] == step
    assert f"arrays of checkpoint {step}:" in inspect.render(found)


def test_names_what_differs(run: Path, tmp_path: Path) -> None:
    other = replace(CONFIG, {"model.name": "resnet14-s8u1", "train.epochs": CONFIG.train.epochs + 1})
    save_run(tmp_path / "other", other, {9: 0.5})
    differing = inspect.inspect(run, "9", str(tmp_path / "other"))["differences"]
    assert differing["config"] == {"model.name": ["resnet14-s4u1-double", "resnet14-s8u1"],
                                   "train.epochs": [CONFIG.train.epochs, CONFIG.train.epochs + 1]}
    assert differing["metrics"] == {"test_accuracy": [0.25, 0.5]}
    assert differing["versions"] == {}
    assert differing["arrays"]["params/bases/group1/first"] == ["float32[3×3×16×4]", None]
    assert differing["arrays"]["params/bases/group1/shared"] == [None, "float32[3×3×16×8]"]
    assert differing["arrays"]["params/group1/block2/first/coefficients"] == ["float32[5×16]", "float32[9×16]"]
    assert "params/head/kernel" not in differing["arrays"]


def test_names_other_images_and_another_beginning(tmp_path: Path) -> None:
    def save(name: str, classes: list[str], init: dict[str, Any] | None = None) -> Path:
        run = save_run(tmp_path / name, CONFIG, {9: 0.5})
        record = json.loads((run / "run.json").read_text())
        record["config"]["data"] |= {"name": "folder", "directory": f"/data/{name}"}
        record["data"]["classes"] = classes
        (run / "run.json").write_text(json.dumps({**record, "init": init}))
        return run
    cats, dogs = save("cats", list("abcdefgh")), save("dogs", list("abcdefgi"), {
        "source": "/weights.pth", "step": None, "network": "resnet14", "head": "kept", "budget": None})
    found = inspect.inspect(cats, against=str(dogs))
    assert found["changed"]["data.directory"] == "/data/cats"
    differing = found["differences"]
    assert differing["config"] == {"data.directory": ["/data/cats", "/data/dogs"]}
    assert differing["data"] == {"classes": [list("abcdefgh"), list("abcdefgi")]}
    assert differing["init"]["source"] == [None, "/weights.pth"]
    text = inspect.render(found)
    assert re.search(r"^  init source +– +/weights.pth$", text, re.MULTILINE)
    assert "… 8 in all" in text
    assert "'h'" not in text


def test_compares_steps_of_one_run(run: Path, tmp_path: Path) -> None:
    found = inspect.inspect(run, "latest", "best")
    assert found["differences"] == {"against": "best", "config": {}, "data": {}, "init": {}, "versions": {},
                                    "arrays": {}, "metrics": {"test_accuracy": [0.25, 0.75]}}
    assert inspect.inspect(run, "9", f"{run}:7")["differences"]["metrics"] == {"test_accuracy": [0.25, 0.75]}
    assert "metrics test_accuracy  0.25  0.75" in inspect.render(found)
    assert "differences from latest: none" in inspect.render(inspect.inspect(run, "9", "latest"))


def test_a_mistake_is_told(run: Path, tmp_path: Path) -> None:
    with user_error("checkpoint '8'", "7, 9"):
        inspect.inspect(run, "8")
    with user_error("checkpoint '8'", "7, 9"):
        inspect.inspect(run, "9", "8")
    with user_error("holds no run", str(tmp_path)):
        inspect.inspect(tmp_path)
    with user_error("holds no run", "absent"):
        inspect.inspect(run, "9", str(tmp_path / "absent"))


def test_tells_a_damaged_checkpoint(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", CONFIG, {1: 0.5})
    (run / "checkpoints/1/state/_METADATA").write_text("{")
    with user_error("checkpoint 1", "cannot be restored"):
        inspect.inspect(run)


@pytest.mark.slow
def test_from_the_command_line(run: Path) -> None:
    def main(*arguments: str) -> Any:
        return subprocess.run([sys.executable, str(ROOT / "main.py"), "--mode=inspect", f"--workdir={run}", *arguments],
                              env=user_environment(), capture_output=True, text=True, timeout=300, check=False)
    shown = main("--against=7")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^  params/head/kernel +float32  64×10 +2\.5 KiB$", shown.stdout, re.MULTILINE)
    assert shown.stderr == ""
    result = json.loads(main("--json").stdout)
    assert result == json.loads(json.dumps(inspect.inspect(run)))
    wrong = main("--against=/no/such/run")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.count("\n") == 1


def test_the_documented_recipe_reads_it_with_orbax_alone(run: Path) -> None:
    """docs/runs.md promises that a checkpoint needs nothing of this package."""
    page = (ROOT / "docs" / "runs.md").read_text()
    recipe = re.search(r"<!-- plain Orbax -->\n```python\n(.*?)```", page, re.DOTALL)
    assert recipe
    assert "shared_basis" not in recipe[1]
    scope: dict[str, Any] = {}
    exec(recipe[1].replace("runs/NAME", str(run)).replace("STEP", "9"), scope)
    with_ours = {array["path"]: array["shape"] for array in inspect.inspect(run, "9")["arrays"]}
    assert {"/".join(path): list(leaf.shape) for path, leaf in scope["arrays"].items()} == with_ours
    rng = np.random.default_rng(9)  # as `save_run` drew them
    shapes = dict(abstract_variables(create_model("resnet14-s4u1-double"), (8, 8, 1)))
    drawn = jax.tree.map(lambda leaf: rng.uniform(0.1, 0.5, leaf.shape).astype(leaf.dtype), shapes)
    assert_trees_equal(scope["bases"], drawn["params"]["bases"])
    assert scope["record"]["config"]["model"] == dataclasses.asdict(CONFIG.model)
