"""A network of one's own, as docs/extending.md shows it: its file, and its commands one after the other."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import ROOT, CommandLine, user_error

import shared_basis
from shared_basis.config import from_config_dict, replace
from shared_basis.models import registry

PAGE = (ROOT / "docs" / "extending.md").read_text()
SHORT = {"train.epochs": 1, "optimizer.warmup_epochs": 0.0, "data.train_examples": 128}
BY_FLAG = [f"--config.{field}={value}" for field, value in SHORT.items()]


def commands() -> list[list[str]]:
    """Returns the arguments of each command that the page calls on its file."""
    block = re.search(r"<!-- not run: tests/end_to_end/test_own_network.py .+ -->\n```sh\n(.+?)```", PAGE, re.DOTALL)
    assert block
    return [shlex.split(line, comments=True)[1:] for line in block[1].splitlines()]


SUMMARY, TRAIN, *AFTER = commands()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a directory with the page's file alone."""
    code = re.search(r"<!-- run: a network of one's own, with its recipe -->\n```python\n(.+?)```", PAGE, re.DOTALL)
    assert code
    directory = tmp_path_factory.mktemp("own")
    (directory / "chain.py").write_text(code[1])
    return directory


@pytest.fixture(scope="module")
def trained(main: CommandLine, directory: Path) -> str:
    """Returns what the page's training prints, shortened."""
    done = main(*TRAIN, *BY_FLAG, cwd=directory)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
def test_its_layers_share_and_are_counted(main: CommandLine, directory: Path) -> None:
    done = main(*SUMMARY, "--json", cwd=directory)
    assert (done.returncode, done.stderr) == (0, "")
    counts = json.loads(done.stdout)
    shared = 9 * 32 * 16
    assert counts["groups"]["body"] == {
        "parameters": shared + 6 * (9 * 32 + 2 * 17 + 17 * 32), "shared_parameters": shared,
        "macs": 64 * 6 * 17 * (9 * 32 + 32)}
    assert counts["plain"]["groups"]["body"]["parameters"] == 6 * 9 * 32 * 32


@pytest.mark.slow
def test_it_trains_with_the_penalty_on_unique_elements_too(trained: str, directory: Path) -> None:
    metrics = json.loads((directory / "runs" / "chain-s16u1" / "metrics.jsonl").read_text().splitlines()[-1])
    # Unique elements begin with norms of some 8 and not of 1, which the penalty sees.
    assert metrics["penalty"] > 1
    assert "(81.4 % fewer than the 55,914 of plain chain)" in trained


@pytest.mark.slow
def test_from_python_its_run_is_loaded_and_goes_on(trained: str, directory: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    # Another test of this process may have registered it.
    monkeypatch.setattr(registry, "FAMILIES", {name: f for name, f in registry.FAMILIES.items() if name != "chain"})
    workdir = directory / "runs" / "chain-s16u1"
    with user_error("unknown network 'chain-s16u1'", "register_network", "--config=FILE.py"):
        shared_basis.load_run(workdir)
    spec = importlib.util.spec_from_file_location("chain", directory / "chain.py")
    assert spec is not None
    assert spec.loader is not None
    chain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chain)
    spec.loader.exec_module(chain)  # as when a cell of a notebook is run again
    model, variables, classes = shared_basis.load_run(workdir, checkpoint=2)
    assert isinstance(model, chain.Chain)
    assert classes == tuple("0123456789")
    logits = jax.eval_shape(lambda images: model.apply(variables, images, train=False), np.zeros((2, 8, 8, 1), "f"))
    assert logits.shape == (2, 10)
    changes = {**SHORT, "orthogonality.elements": "shared+unique"}
    result = shared_basis.train(replace(from_config_dict(chain.get_config()), changes), workdir)
    assert result["step"] == 2
    assert "this run is finished" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("arguments", AFTER, ids=" ".join)
@pytest.mark.usefixtures("trained")
def test_each_command_of_the_page_runs(main: CommandLine, directory: Path, arguments: list[str]) -> None:
    done = main(*arguments, cwd=directory)
    assert (done.returncode, done.stderr) == (0, "")
    assert "chain-s16u1" in done.stdout


@pytest.fixture(scope="module")
def plain(main: CommandLine, directory: Path) -> Path:
    """Returns the run of the page's network without sharing, which has no batch normalisation at all."""
    done = main("--config=chain.py:chain", *BY_FLAG, cwd=directory)
    assert (done.returncode, done.stderr) == (0, "")
    return directory / "runs" / "chain"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--mode=evaluate"], ["--mode=inspect"], ["--mode=analyze"], ["--mode=export"],
                                       ["--mode=export", "--format=stablehlo"]], ids=" ".join)
def test_a_network_without_batch_statistics_passes_every_mode(main: CommandLine, plain: Path,
                                                              arguments: list[str]) -> None:
    done = main(*arguments, "--config=chain.py", "--workdir=runs/chain", cwd=plain.parents[1])
    assert (done.returncode, done.stderr) == (0, "")
    assert "chain" in done.stdout


@pytest.mark.slow
def test_a_plain_one_is_compressed_to_one_that_shares(main: CommandLine, plain: Path) -> None:
    done = main("--mode=compress", "--source=runs/chain", "--config=chain.py:chain-s16u1", cwd=plain.parents[1])
    assert (done.returncode, done.stderr) == (0, "")
    assert "the orthogonality penalty is" in done.stdout
