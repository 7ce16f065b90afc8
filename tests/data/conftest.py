"""What the tests of `shared_basis.data` share: no network, the message of an error, fake sources."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from data_helpers import load
from PIL import EpsImagePlugin, Image

from shared_basis import data
from shared_basis.config import DataConfig
from shared_basis.errors import UserError


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets no test look up a host, so that a forgotten fake cannot start a download."""
    look_up = socket.getaddrinfo

    def local_only(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host != "127.0.0.1":
            raise socket.gaierror(f"tests have no network (looked up {host})")
        return look_up(host, *args, **kwargs)
    monkeypatch.setattr(socket, "getaddrinfo", local_only)


@pytest.fixture
def mistake() -> Callable[[DataConfig], str]:
    """Returns a function that loads, expects a `UserError`, and returns its message, one line."""
    def failing(config: DataConfig, read: Callable[[DataConfig], Any] = load) -> str:
        with pytest.raises(UserError) as caught:
            read(config)
        message = str(caught.value)
        assert "\n" not in message
        return message
    return failing


@pytest.fixture
def ghostscript(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns the calls of Ghostscript, which would run the programs in EPS files."""
    calls: list[Any] = []

    def called(*arguments: Any) -> Any:
        calls.append(arguments)
        return Image.new("RGB", (8, 8)).im
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", called)
    return calls


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Mapping[str, bytes]], DataConfig]:
    """Returns a function that writes source files, makes their checksums the expected ones, and returns a config."""
    import tfds_fakes  # imports TFDS, which other tests do without

    def write(name: str, files: Mapping[str, bytes]) -> DataConfig:
        manual = tmp_path / "manual"
        manual.mkdir(exist_ok=True)
        for file, body in files.items():
            (manual / file).write_bytes(body)
        tfds_fakes.publish(name, files, monkeypatch.setattr)
        return DataConfig(name=name, directory=str(tmp_path / "tfds"), manual_directory=str(manual))
    return write


@pytest.fixture
def prepared(put: Callable[[str, Mapping[str, bytes]], DataConfig]) -> tuple[DataConfig, Path]:
    """A prepared fake cifar10: its config, without the sources, and the directory of its files."""
    import tfds_fakes

    config = put("cifar10", tfds_fakes.cifar10_files())
    data.prepare(config)
    shutil.rmtree(config.manual_directory)
    return DataConfig(name="cifar10", directory=config.directory), Path(config.directory) / "cifar10" / "3.0.2"
