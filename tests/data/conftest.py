"""What the tests of `shared_basis.data` share: no network, and how they expect a user's mistake to be told."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest

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
    def load(config: DataConfig, read: Callable[[DataConfig], Any] = data.load) -> str:
        with pytest.raises(UserError) as caught:
            read(config)
        message = str(caught.value)
        assert "\n" not in message
        return message
    return load
