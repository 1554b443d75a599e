"""Keep the settings of this machine out of the tests."""

from __future__ import annotations

import pytest


def no_settings_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Set a private home and remove dstack's variables."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    for name in (
        "DSTACK_SERVER_URL",
        "DSTACK_PROJECT",
        "DSTACK_TOKEN",
        "DSTACK_PROFILE",
        "DSTACK_NO_PROFILE",
    ):
        monkeypatch.delenv(name, raising=False)
