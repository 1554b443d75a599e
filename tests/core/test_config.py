"""Environment variables of a client that are set but empty."""

from __future__ import annotations

from pathlib import Path

import pytest

import dstack_core as dstack
from dstack_core import config

SERVER = {"DSTACK_SERVER_URL": "http://server:3000", "DSTACK_PROJECT": "main", "DSTACK_TOKEN": "secret"}
GIVEN = {"DSTACK_SERVER_URL": "server_url", "DSTACK_PROJECT": "project_name", "DSTACK_TOKEN": "user_token"}


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SERVER:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("empty", SERVER)
def test_the_error_for_an_empty_variable_names_it(
    empty: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in (SERVER | {empty: ""}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(dstack.ProjectNotConfiguredError) as raised:
        config.from_config(None, None, None, home=tmp_path)
    message = raised.value.message
    assert message.startswith(f"{empty}: expected the ")
    assert message.endswith("got an empty value. Set it where this process is started.")
    arguments = {GIVEN[name]: None if name == empty else value for name, value in SERVER.items()}
    with pytest.raises(dstack.ProjectNotConfiguredError) as raised:
        config.from_arguments(**arguments)
    assert raised.value.message == message


def test_an_empty_token_does_not_hide_the_configuration_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DSTACK_TOKEN", "")
    monkeypatch.setenv("DSTACK_SERVER_URL", "http://server:3000")
    file = tmp_path / ".dstack" / "config.yml"
    file.parent.mkdir()
    file.write_text("projects: [{name: main, url: 'http://other:3000', token: t, default: true}]")
    assert config.from_config(None, None, None, home=tmp_path).server_url == "http://other:3000"
