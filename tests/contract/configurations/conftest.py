"""The official client, and a folder in which both clients find the same files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.configurations.clients import OfficialClient


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OfficialClient]:
    """Yield the official client, once for all tests of a process."""
    with OfficialClient(tmp_path_factory.mktemp("home")) as client:
        yield client


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty current directory, and set a home without a profile."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("DSTACK_PROFILE", "DSTACK_NO_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
