"""Recipes are found by name in every directory, and the user's own files before them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import ROOT, user_error

from shared_basis.cli import recipes
from shared_basis.cli.app import parse
from shared_basis.config import from_config_dict
from shared_basis.errors import UserError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Goes to an empty directory, as users do who have installed the package."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_recipes_of_the_repository_are_known() -> None:
    assert recipes.names() == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    assert "digits_resnet" in recipes.names()


@pytest.mark.parametrize("form", ["configs/cifar_resnet.py", "cifar_resnet.py", "cifar_resnet", "./cifar_resnet",
                                  "configs/cifar_resnet", "./configs/cifar_resnet.py"])
def test_a_recipe_of_the_package_is_found_by_name(form: str) -> None:
    values, _ = parse(["main.py", f"--config={form}:resnet56-s16u1-double", "--config.seed=3"])
    config = from_config_dict(values.config)
    assert (config.name, config.seed) == ("cifar_resnet-resnet56-s16u1-double", 3)
    assert recipes.locate(form) == str(ROOT / "configs" / "cifar_resnet.py")


def test_a_file_of_the_user_comes_first(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "configs").mkdir()
    own = elsewhere / "configs" / "cifar_resnet.py"
    shutil.copy(ROOT / "configs" / "digits_resnet.py", own)
    assert recipes.locate("configs/cifar_resnet.py:resnet20") == "configs/cifar_resnet.py:resnet20"
    assert recipes.locate("cifar_resnet") != str(own)
    monkeypatch.setenv("HOME", str(elsewhere))
    assert recipes.locate("~/configs/cifar_resnet.py") == str(own)


@pytest.mark.parametrize("form", ["other/cifar_resnet.py", "/configs/cifar_resnet.py", "cifar_resnets",
                                  "configs/cifar-resnet.py:resnet56"])
def test_others_are_refused_with_the_names_of_those_there_are(form: str) -> None:
    file = form.partition(":")[0]
    with user_error(f"--config={file}: no such file", ", ".join(recipes.names()), "Did you mean cifar_resnet?"):
        recipes.locate(form)


def test_what_resembles_none_is_not_taken_for_one() -> None:
    with pytest.raises(UserError) as caught:
        recipes.locate("mine.py")
    assert "Did you mean" not in str(caught.value)
