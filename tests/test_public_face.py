"""What `import shared_basis` gives: names, types, versions; and what it leaves alone."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from helpers import ROOT, save_run

import shared_basis
from shared_basis.cli import app
from shared_basis.config import Config, ModelConfig
from shared_basis.errors import RenamedWarning, UserError

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def imported_for_types() -> dict[str, str]:
    """Returns by name the module that a type checker finds it in."""
    tree = ast.parse(Path(shared_basis.__file__).read_text())
    return {alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names}


def test_types_and_objects_of_public_names_come_from_the_same_place() -> None:
    modules = imported_for_types()
    for name in set(shared_basis.__all__) - {"__version__"}:
        assert getattr(shared_basis, name) is getattr(importlib.import_module(modules[name]), name), name
    assert set(dir(shared_basis)) >= set(shared_basis.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        shared_basis.trian  # noqa: B018


def test_what_is_installed_is_what_the_project_says() -> None:
    assert shared_basis.__version__ == PROJECT["project"]["version"]
    assert pkgutil.resolve_name(PROJECT["project"]["scripts"]["shared-basis"]) is app.main
    for package, names in PROJECT["tool"]["setuptools"]["package-data"].items():
        assert all((ROOT / package / name).is_file() for name in names)
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["shared_basis"]


def test_earlier_names_work_with_a_note(tmp_path: Path) -> None:
    with pytest.warns(RenamedWarning, match="load_official is now load_pytorch_weights"), pytest.raises(UserError):
        shared_basis.load_official(tmp_path / "none.pth", shared_basis.create_model("resnet14"))
    with pytest.warns(RenamedWarning, match="BasisGroup"):
        assert shared_basis.ElementSet(["bases/body"]) == shared_basis.BasisGroup(["bases/body"])


_LEAVES_ALONE = """
import logging, os, signal, sys, warnings

def process():
    return {"environment": dict(os.environ), "warnings": list(warnings.filters), "show": warnings.showwarning,
            "handlers": list(logging.getLogger().handlers), "level": logging.getLogger().level,
            "signals": [signal.getsignal(number) for number in signal.valid_signals()],
            "hooks": (sys.excepthook, sys.unraisablehook), "path": list(sys.path), "directory": os.getcwd()}

def assert_same(before, after):
    changed = {name: (value, after[name]) for name, value in before.items() if value != after[name]}
    assert not changed, changed

before = process()
import shared_basis
assert_same(before, process())
heavy = {"jax", "flax", "numpy", "optax", "orbax", "grain", "absl", "importlib.metadata"} & set(sys.modules)
assert not heavy, heavy

import flax.linen, grain, jax, optax, orbax.checkpoint  # which may change what they like
jax.devices()
before, config = process(), dict(jax.config.values)
for name in shared_basis.__all__:
    getattr(shared_basis, name)
model, variables, classes = shared_basis.load_run(sys.argv[1])
assert len(classes) == 10
assert_same(before, process())
assert_same(config, dict(jax.config.values))
for name in ("tensorflow_datasets", "matplotlib", "sklearn.datasets", "onnx", "tensorboardX"):
    assert name not in sys.modules, name
"""


def test_importing_is_light_and_neither_it_nor_loading_a_run_changes_anything_global(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", Config(model=ModelConfig(name="resnet14-s2u1")), {1: 0.5})
    done = subprocess.run([sys.executable, "-c", _LEAVES_ALONE, str(run)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, done.stderr


def test_the_recipes_are_found_where_pip_has_put_them(tmp_path: Path) -> None:
    site = tmp_path / "site-packages" / "shared_basis"
    for part in ("__init__.py", "errors.py", "config", "cli"):
        copy = shutil.copytree if (ROOT / "shared_basis" / part).is_dir() else shutil.copy
        site.mkdir(parents=True, exist_ok=True)
        copy(ROOT / "shared_basis" / part, site / part)
    shutil.copytree(ROOT / "configs", site / "configs")  # as setup.py says

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = ("from shared_basis.cli import app; import sys; app.run_and_exit("
                   "lambda: print(app.parse(['shared-basis', *sys.argv[1:]])[0].config.name))")
        environment = {**os.environ, "PYTHONPATH": str(site.parent), "PYTHONWARNINGS": "ignore"}
        return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=tmp_path,
                              check=False, env=environment)

    assert call().stdout == "digits_resnet-resnet20-s8u1-double\n", call().stderr
    assert call("--config=cifar_resnet:resnet20").stdout == "cifar_resnet-resnet20\n"
    (site / "configs" / "cifar_resnet.py").unlink()
    absent = call("--config=configs/cifar_resnet.py")
    assert absent.returncode == 2
    assert "--config=configs/cifar_resnet.py: no such file or recipe" in absent.stderr


_STRANGER = """
from __future__ import annotations

import flax.linen as nn
import jax

import shared_basis
from shared_basis import BasisConv, BasisGroup, BatchNorm, Config, Network, Sharing, UserError


class Mine(Network):
    def shared_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        return {"body": {name: (3, 3, 8, self.sharing.shared_rank) for _, name in self.sharing.layers}}

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        layer = BasisConv(8, unique_rank=self.sharing.unique_rank, use_bias=False)
        return layer(images, train=train, then=BatchNorm(train))


staged: type[Network] = shared_basis.StagedNetwork
shared_basis.register_network("mine", Mine, forms=["s<S>u<U>"])
model: Network = shared_basis.create_model("mine-s4u1", num_classes=10)
shared_basis.check_network(Mine(10, Sharing((("conv", "shared"),), shared_rank=4)), (8, 8, 3))
groups = [BasisGroup(["bases/body"]), *model.basis_groups("shared+unique")]
links = shared_basis.add_orthogonality_penalty(10.0, groups), shared_basis.keep_orthonormal(groups)
bases = shared_basis.init_shared_bases(jax.random.key(0), {"body": (3, 3, 8, 4)})
penalty: jax.Array = shared_basis.orthogonality_penalty({"bases": bases}, groups)
numbers: dict[str, jax.Array] = shared_basis.orthogonality_diagnostics({"bases": bases}, groups)
network, variables, classes = shared_basis.load_run("runs/mine", checkpoint="best")
weights = shared_basis.load_pytorch_weights("mine.pth", network)
version: str = shared_basis.__version__
result = shared_basis.train(Config(), "runs/mine", shared_basis.Reporter(verbosity="quiet"))["step"]
compressed = shared_basis.compress(Config(), "runs/mine", budget=0.5).network
compiled = jax.jit(lambda x: x, compiler_options=shared_basis.compiler_options())
kinds = shared_basis.parameter_kinds({"bases": bases}), shared_basis.mask_by_kind(["kernel"])
counts: dict[str, int] = shared_basis.count_by_kind({"bases": bases}, groups)
picture: bytes = shared_basis.draw_basis(bases["body"])
with shared_basis.forms_for("cpu"):
    pass
factors: shared_basis.SharedFactors = shared_basis.factorize_kernels(
    [bases["body"]], 2, activations=[shared_basis.patch_moments(bases["body"])], biases=[None])
factor: shared_basis.LayerFactors = factors.layers[0]
in_nnx = shared_basis.nnx.BasisConv
error: ValueError = UserError("")
reveal_type((network, classes, compressed))
shared_basis.trian
shared_basis.register_network(3, Mine)
"""


def test_the_stranger_s_script_names_all_that_is_public() -> None:
    assert [name for name in shared_basis.__all__ if name not in _STRANGER] == []


@pytest.mark.slow
def test_a_stranger_s_strict_mypy_sees_every_type(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    venv.create(tmp_path / "venv")
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "shared_basis").symlink_to(ROOT / "shared_basis")  # installed, so that py.typed counts
    (site / "others.pth").write_text(next(path for path in sys.path if path.endswith("site-packages")))
    (tmp_path / "script.py").write_text(_STRANGER)
    done = subprocess.run([sys.executable, "-m", "mypy", "--strict", "--cache-dir=cache", "--python-executable",
                           "venv/bin/python", "script.py"], capture_output=True, text=True, cwd=tmp_path, check=False,
                          env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    line = 1 + len(_STRANGER.splitlines())
    assert [text.partition(": ")[2].partition("  [")[0] for text in done.stdout.splitlines()[:-1]] == [
        'note: Revealed type is "tuple[shared_basis.models.base.Network, tuple[str, ...], '
        'shared_basis.models.base.Network]"',
        'error: Module has no attribute "trian"; maybe "train"?',
        'error: Argument 1 to "register_network" has incompatible type "int"; expected "str"'], done.stdout
    assert f"script.py:{line - 3}: note" in done.stdout
