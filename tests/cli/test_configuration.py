"""Which configuration a command line means: the recipe's, that of a run, that of a folder of images."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import ROOT, TINY, user_error

from shared_basis.cli import configuration
from shared_basis.cli.app import TRAINED_MODES, parse
from shared_basis.config import Config, DataConfig, ModelConfig, TrainConfig, replace
from shared_basis.runs.workdir import Workdir, make_record

FOLDER = f"--config={ROOT / 'configs' / 'folder.py'}"
CIFAR = f"--config={ROOT / 'configs' / 'cifar_resnet.py'}"
RUN = Config(name="mine", model=ModelConfig(name=TINY), data=DataConfig(train_examples=40),
             train=TrainConfig(epochs=3, batch_size=8))


def read(*arguments: str) -> configuration.Configuration:
    values, _ = parse(["main.py", *arguments])
    return configuration.read(values, values.mode in TRAINED_MODES)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the current directory, with a run and a folder of images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photo.jpg").write_bytes(b"")
    Workdir("run").claim(make_record(RUN, {"classes": ["a", "b"], "image_shape": [8, 8, 1]}))
    return tmp_path


@pytest.mark.usefixtures("desk")
def test_images_alone_mean_the_recipe_of_folders_and_a_run_named_after_them() -> None:
    for arguments in (("--images=photos",), ("--images", "photos/"), ("--mode", "summary", "--images=./photos")):
        config, _, workdir = read(*arguments)
        assert (config.data.name, config.data.mean, config.train.batch_size) == ("folder", (), 0)
        assert (config.name, workdir) == ("photos-resnet20-s8u1-double", "runs/photos-resnet20-s8u1-double")
    config, _, workdir = read(f"{FOLDER}:resnet34-s32u1", "--config.data.directory=photos", "--config.train.epochs=1")
    assert (config.data.directory, config.train.epochs, config.data.image_size) == ("photos", 1, 224)
    assert workdir == "runs/photos-resnet34-s32u1"


@pytest.mark.usefixtures("desk")
def test_a_folder_may_be_given_by_its_fields() -> None:
    fields = ("--config.data.name=folder", "--config.data.directory=photos")
    short, long = read("--images=photos"), read(*fields)
    assert (long.config, long.workdir) == (short.config, short.workdir)
    assert read("--mode=summary", *fields).config == short.config
    assert read(f"{CIFAR}:resnet20", *fields).config == read(f"{CIFAR}:resnet20", "--images=photos").config
    with user_error("data.directory", "--images=DIR"):
        read("--config.data.name=folder")


def test_names_of_folders_become_names_of_runs(desk: Path) -> None:
    for name, expected in ((".hidden", "hidden"), ("a\\b\n", "a_b_"), ("...", "images")):
        (desk / name).mkdir()
        assert read(f"--images={name}")[0].name == f"{expected}-resnet20-s8u1-double"


@pytest.mark.usefixtures("desk")
def test_a_run_is_named_after_the_network_however_it_is_given() -> None:
    other = "--config.model.name=resnet32-s8u1"
    config, _, workdir = read("--images=photos", other)
    assert (config.model.name, config.name) == ("resnet32-s8u1", "photos-resnet32-s8u1")
    assert workdir == "runs/photos-resnet32-s8u1"
    assert read(f"{CIFAR}:resnet20", other).workdir == "runs/cifar_resnet-resnet32-s8u1"
    assert read(f"{CIFAR}:resnet20", "--config.model.name=resnet20").workdir == "runs/cifar_resnet-resnet20"
    assert read(f"{CIFAR}:resnet20", other, "--config.name=x").workdir == "runs/x"


@pytest.mark.usefixtures("desk")
def test_images_replace_the_data_of_another_recipe() -> None:
    config, overrides, workdir = read(f"{CIFAR}:resnet20", "--images=photos", "--config.data.image_size=32")
    assert config.data == DataConfig(name="folder", directory="photos", image_size=32, mean=(0.485, 0.456, 0.406),
                                     std=(0.229, 0.224, 0.225), pad=4, flip=True)
    assert workdir == "runs/cifar_resnet-resnet20"
    assert overrides["data.directory"] == "photos"


@pytest.mark.usefixtures("desk")
def test_a_workdir_alone_means_its_run_with_what_is_set() -> None:
    config, overrides, workdir = read("--workdir=run", "--config.train.epochs=9")
    assert (config, overrides) == (replace(RUN, {"train.epochs": 9}), {"train.epochs": 9})
    assert workdir == "run"
    assert read("--workdir=run", "--mode=summary", CIFAR)[0] == RUN, "as ever"
    assert read("--workdir=run", CIFAR)[0].data.name == "cifar10", "a recipe is compared with the run"
    assert read("--workdir=new")[0].name == "digits_resnet-resnet20-s8u1-double", "there is no run yet"


@pytest.mark.usefixtures("desk")
def test_a_new_run_from_the_weights_of_another_takes_its_recipe() -> None:
    config, _, workdir = read("--init=run:best", "--workdir=new", "--config.train.epochs=40")
    assert workdir == "new"
    assert config == replace(read("--workdir=run").config, {"train.epochs": 40})
    assert read("--init=run", "--images=photos").config.data.name == "folder"
    assert read("--init=run", CIFAR).config.data.name == "cifar10"


@pytest.mark.usefixtures("desk")
def test_compression_takes_the_configuration_of_its_source() -> None:
    config, _, workdir = read("--mode=compress", "--source=run", "--config.model.name=resnet20-s8u1")
    assert config == replace(RUN, {"model.name": "resnet20-s8u1", "name": "mine-resnet20-s8u1"})
    assert workdir == "runs/mine-resnet20-s8u1"
    assert read("--mode=compress", "--source=run")[0] == RUN
    assert read("--mode=compress", "--source=run", CIFAR)[0].data.name == "cifar10"
    assert read("--mode=compress", "--source=run", "--config.model.name=resnet20", "--config.name=x")[0].name == "x"


@pytest.mark.usefixtures("desk")
def test_modes_of_a_trained_run_take_another_folder_as_overrides() -> None:
    _, overrides, workdir = read("--mode=evaluate", "--workdir=run", "--images=photos", "--config.data.test=0.5")
    assert overrides == {"data.name": "folder", "data.directory": "photos", "data.manual_directory": "",
                         "data.train_split": "", "data.test_split": "", "data.validation_split": "", "data.test": 0.5}
    assert workdir == "run"
    assert read("--mode=predict", "--workdir=run", "--images=photo.jpg", "--images=photos").overrides == {}
    assert read("--mode=evaluate", FOLDER, "--images=photos").workdir == "runs/photos-resnet20-s8u1-double"


@pytest.mark.parametrize(("arguments", "parts"), [
    (("--images=absent",), ("--images=absent: cannot be found", "<class>/*")),
    (("--images=photo.jpg",), ("--images=photo.jpg: is a file", "--mode=train takes a directory")),
    (("--images=photos", "--images=more"), ("--images=more", "one directory", "predict")),
    (("--images=photos", "--config.data.directory=other"), ("data.directory=other", "give only one of them")),
    (("--images=photos", "--config.data.name=cifar10"), ("data.name=cifar10", "give only one of them")),
    (("--images=photos", "--config.data.train_split=x"), ("data.train_split='x'", "data.name='folder' ignores")),
    ((FOLDER,), ("--images=DIR",)),
    ((FOLDER, "--mode=evaluate"), ("--workdir=RUN", "--images=DIR")),
    (("--config.data.directory=photos",), ("data.name='digits' ignores this field", "--images=DIR")),
    (("--config.data.test=0.5",), ("data.test=0.5", "data.name='digits' ignores this field")),
    ((CIFAR, "--config.data.test=0.5"), ("data.test=0.5", "data.name='cifar10' ignores this field")),
    (("--images=photos", "--config.data.manual_directory=x"), ("data.manual_directory='x'", "folder")),
    (("--workdir=run", "--config.data.directory=photos"), ("data.name='digits' ignores this field",)),
    (("--mode=compress", "--source=photo.jpg"), ("--source=photo.jpg", "add --config=RECIPE.py:NETWORK")),
    (("--workdir=photo.jpg/run",), ("cannot be read",))], ids=" ".join)
@pytest.mark.usefixtures("desk")
def test_what_does_not_fit_is_refused_in_one_line(arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    with user_error(*parts):
        read(*arguments)


def test_every_mode_that_reads_the_folder_of_a_run_takes_it_where_it_has_moved(tmp_path: Path) -> None:
    """As the message on a folder that cannot be found advises."""
    for mode in ("evaluate", "export", "analyze", "report"):
        found = read(f"--mode={mode}", "--workdir=run", f"--images={tmp_path}")
        assert found.overrides["data.directory"] == str(tmp_path)
