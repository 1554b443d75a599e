from __future__ import annotations

import pytest

from tests.core.scripted import Driver


@pytest.fixture(params=["sync", "async"])
def driver(request: pytest.FixtureRequest) -> Driver:
    return Driver(request.param)


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    for name in ("DSTACK_SERVER_URL", "DSTACK_PROJECT", "DSTACK_TOKEN"):
        monkeypatch.delenv(name, raising=False)
