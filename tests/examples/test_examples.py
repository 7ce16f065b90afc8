"""The examples run, keep what they claim, use the public face alone, and are what docs/examples.md shows of them."""

from __future__ import annotations

import ast
import functools
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT

import shared_basis
import shared_basis.nnx

EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py")
                  if path.stem not in ("own_model", "make_notebook", "pytorch_resnet"))  # see the tests beside
NAMES = [path.stem for path in EXAMPLES]
PAGE = (ROOT / "docs" / "examples.md").read_text()


def parameters(text: str) -> list[str]:
    """Returns the counts of parameters that an output names."""
    return re.findall(r"([\d,]+) parameters", text)


def test_there_are_three() -> None:
    assert NAMES == ["compress_flax_model", "nnx_convnet", "unet"]


@pytest.mark.parametrize("path", EXAMPLES, ids=NAMES)
def test_it_is_short_and_takes_public_names_alone(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 150
    taken = {(node.module, alias.name) for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shared_basis")
             for alias in node.names}
    assert taken
    assert taken <= {(module.__name__, name) for module in (shared_basis, shared_basis.nnx) for name in module.__all__}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_shows_networks_of_which_one_is_half_as_large(name: str, capsys: pytest.CaptureFixture[str],
                                                                  tmp_path: Path) -> None:
    picture = [f"--picture={tmp_path / 'basis.png'}"] if name == "nnx_convnet" else []
    importlib.import_module(f"examples.{name}").main(["--tiny", *picture])
    plain, *_, shared = [int(number.replace(",", "")) for number in parameters(capsys.readouterr().out)]
    assert shared < plain / 2
    assert not picture or (tmp_path / "basis.png").read_bytes().startswith(b"\x89PNG")


def test_the_u_net_is_what_the_page_says_before_it_is_computed() -> None:
    unet = importlib.import_module("examples.unet")
    images = jax.ShapeDtypeStruct((1, 16, 16, 1), jnp.float32)
    for shared, size in zip((False, True), (55_187, 16_839), strict=True):
        params = jax.eval_shape(functools.partial(unet.UNet(shared).init, train=False), jax.random.key(0),
                                images)["params"]
        counts = shared_basis.count_by_kind(params, unet.GROUPS if shared else ())
        assert sum(counts.values()) == size
        assert f"{size:,} parameters (kernels {counts['kernel']:,}, bases {counts['basis']:,}" in PAGE


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_as_a_user_runs_it_all_that_it_claims_is_true_and_the_page_shows_it(name: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}
    done = subprocess.run([sys.executable, f"examples/{name}.py"], capture_output=True, text=True, cwd=ROOT,
                          check=False, env={**environment, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"})
    assert (done.returncode, done.stderr) == (0, "")
    (shown,) = re.findall(rf"python examples/{name}\.py[^\n]*\n```\n\n```text\n(.+?)```", PAGE, re.DOTALL)
    assert parameters(done.stdout) == parameters(shown)
    assert len(done.stdout.splitlines()) == len(shown.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attribute", "replacement", "message"), [
    ("nnx_convnet", "keep_orthonormal", lambda groups, optimizer: optimizer, "not orthonormal"),
    ("unet", "count_by_kind", lambda params: {"kernel": 1, "basis": 0, "coefficients": 0}, "not half as large"),
    ("compress_flax_model", "count_by_kind", lambda params: {"kernel": 1}, "not half as large"),
])
def test_it_fails_where_what_it_claims_is_false(monkeypatch: pytest.MonkeyPatch, name: str, attribute: str,
                                                replacement: object, message: str) -> None:
    module = importlib.import_module(f"examples.{name}")
    monkeypatch.setattr(module, attribute, replacement)
    with pytest.raises(SystemExit, match=message):
        module.main(["--tiny"])


def test_intersection_over_union() -> None:
    found, classes = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0])
    assert importlib.import_module("examples.unet").mean_iou(found, classes) == pytest.approx((1 / 3 + 1 / 2) / 2)


@pytest.mark.parametrize(("name", "shown"), re.findall(r"<!-- from examples/(\w+)\.py -->\n```python\n(.+?)```", PAGE,
                                                       re.DOTALL))
def test_what_the_page_shows_is_in_the_file(name: str, shown: str) -> None:
    assert shown in (ROOT / "examples" / f"{name}.py").read_text()
