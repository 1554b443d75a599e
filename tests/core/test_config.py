"""The settings of a client: arguments, environment variables and the configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core import ConfigurationError, ProjectNotConfiguredError, config

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


CONFIG = """
projects:
- {name: main, url: 'http://one:3000/', token: tok-1, default: true}
- {name: lab, url: http://two:3000, token: tok-2}
"""


def write_config(text: str, name: str = "config.yml") -> None:
    folder = Path.home() / ".dstack"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)


@pytest.mark.parametrize("name", ["config.yml", "config.yaml"])
def test_from_config_reads_the_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(CONFIG, name)
    client = dstack.Client.from_config()
    assert (client.server_url, client.project) == ("http://one:3000", "main")
    assert dstack.AsyncClient.from_config(project_name="lab").server_url == "http://two:3000"
    monkeypatch.setenv("DSTACK_PROJECT", "lab")
    assert dstack.Client.from_config().project == "lab"


def test_arguments_override_the_environment_and_that_overrides_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_config(CONFIG)
    monkeypatch.setenv("DSTACK_SERVER_URL", "http://env:3000")
    monkeypatch.setenv("DSTACK_TOKEN", "tok-env")
    monkeypatch.setenv("DSTACK_PROJECT", "env")
    assert dstack.Client.from_config().server_url == "http://env:3000"
    assert dstack.Client().project == "env"
    given = dstack.Client.from_config(server_url="http://arg:3000", user_token="t", project_name="arg")
    assert (given.server_url, given.project) == ("http://arg:3000", "arg")


@pytest.mark.parametrize(
    ("config", "arguments", "text"),
    [
        (None, {}, r"expected a file .*config\.yml \(or config\.yaml\), got none.*Pass server_url="),
        (
            CONFIG,
            {"project_name": "nope"},
            r"project_name: expected a project of .*\(main, lab\), got 'nope'",
        ),
        (
            CONFIG.replace("default: true", "default: false"),
            {},
            r"expected a default project, got none \(projects: main, lab\)",
        ),
        (
            CONFIG,
            {"server_url": "http://x"},
            r"server_url and user_token: expected both, got only server_url",
        ),
        ("projects: 3", {}, r"expected a list of `projects`, got none"),
        (
            "projects:\n- {name: a, default: true, url: 'http://x'}",
            {},
            r"expected a token for the project 'a', got none",
        ),
        (
            "projects:\n- {name: a, default: true, url: x, token: tok-1}",
            {},
            r"server_url: expected an address .*, got 'x'",
        ),
        ("token: [tok-1", {}, r"config\.yml, line \d+: expected YAML"),
        (CONFIG, {"repo_dir": "/nowhere"}, r"repo_dir: expected a directory, got '/nowhere'"),
    ],
)
def test_from_config_names_what_is_missing(config: str | None, arguments: dict[str, Any], text: str) -> None:
    if config is not None:
        write_config(config)
    with pytest.raises(ConfigurationError, match=text) as caught:
        dstack.Client.from_config(**arguments)
    assert "tok-" not in str(caught.value)


def test_a_client_without_any_setting_names_all_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ProjectNotConfiguredError, match="server_url and project_name and user_token: expected an argument"
    ):
        dstack.Client()
    monkeypatch.setenv("DSTACK_SERVER_URL", "http://env")
    with pytest.raises(
        ProjectNotConfiguredError, match=r"^project_name and user_token: expected an argument"
    ):
        dstack.Client()


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("http://a b", "ui_url: expected an address such as https://dstack.example.com, got 'http://a b'"),
        ("https://x.y:port", "got 'https://x.y:port'. Correct the host or the port."),
        ("https://", "got 'https://'"),
        (
            "https://x/?a=b",
            "ui_url: expected an address that ends with its path, got 'https://x/?a=b'. Remove",
        ),
        ("https://x/#runs", "got 'https://x/#runs'. Remove what begins with ? or #."),
        ("https://u:p@x.y", "ui_url: expected an address without a user and password"),
        ("https://u:p@[x", "ui_url: expected an address without a user and password"),
    ],
)
def test_what_cannot_be_an_address_for_browsers_is_refused(address: str, text: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        config.ui_url(address, of_environment=False)
    assert text in raised.value.message
    assert "u:p" not in raised.value.message


@pytest.mark.parametrize("address", ["https://x.y", "http://[::1]:3000/", "https://x.y/dstack/"])
def test_an_address_for_browsers_may_have_a_path(address: str) -> None:
    assert config.ui_url(address, of_environment=False) == address.rstrip("/")
