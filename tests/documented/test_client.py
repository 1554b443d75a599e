"""Client.from_config(): every documented parameter and statement."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

import dstack_core as dstack
from tests.documented.conftest import Bench

NINE = {
    "repo_dir": None,
    "project_name": None,
    "server_url": None,
    "user_token": None,
    "git_identity_file": None,
    "oauth_token": None,
    "ssh_identity_file": None,
    "local_repo": False,
    "init": True,
}


@pytest.fixture
def config(bench: Bench, home: Path) -> Path:
    """Write the file that dstack's own CLI writes."""
    path = home / ".dstack" / "config.yml"
    path.parent.mkdir()
    projects: list[dict[str, Any]] = [
        {"name": "other", "url": "http://127.0.0.1:9", "token": "x", "default": False},
        {"name": bench.server.project, "url": bench.server.url, "token": bench.server.token, "default": True},
    ]
    path.write_text(yaml.safe_dump({"projects": projects}))
    return path


def test_from_config_has_the_nine_parameters_in_the_documented_order() -> None:
    for kind in (dstack.Client, dstack.AsyncClient):
        parameters = list(inspect.signature(kind.from_config).parameters.values())
        positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
        assert list(positional.items()) == list(NINE.items())


def test_from_config_loads_address_and_token_from_the_file(bench: Bench, config: Path) -> None:
    with dstack.Client.from_config() as client:
        assert (client.server_url, client.project) == (bench.server.url, bench.server.project)
        assert client.runs.get("not-there") is None, "the token of the file is valid"


def test_from_config_takes_the_default_project_unless_one_is_named(config: Path) -> None:
    assert dstack.Client.from_config(project_name="other").project == "other"
    with pytest.raises(
        dstack.ProjectNotConfiguredError, match=r"project_name: expected a project of .*, got 'third'"
    ):
        dstack.Client.from_config(project_name="third")


def test_from_config_without_a_file_names_what_to_do(home: Path) -> None:
    with pytest.raises(
        dstack.ProjectNotConfiguredError,
        match=r"expected a file .*config\.yml.*, got none.*DSTACK_SERVER_URL",
    ):
        dstack.Client.from_config()


def test_from_config_takes_address_project_and_token_together(bench: Bench, home: Path) -> None:
    with dstack.Client.from_config(
        None, bench.server.project, bench.server.url, bench.server.token
    ) as client:
        assert client.runs.get("not-there") is None
    halves: list[dict[str, Any]] = [{"server_url": bench.server.url}, {"user_token": "x"}]
    for given in halves:
        with pytest.raises(dstack.ConfigurationError, match="server_url and user_token: expected both"):
            dstack.Client.from_config(**given)
    with pytest.raises(dstack.ProjectNotConfiguredError, match="project_name: expected an argument"):
        dstack.Client.from_config(server_url=bench.server.url, user_token="x")


def test_from_config_expands_the_home_in_repo_dir(bench: Bench, config: Path, home: Path) -> None:
    (home / "dstack-examples").mkdir()
    (home / "dstack-examples" / "data.txt").write_text("from the repo\n")
    with dstack.Client.from_config(repo_dir="~/dstack-examples") as client:
        run = client.runs.submit(dstack.Task(commands=["cat data.txt"]))
        assert run.wait(timeout=60, poll_interval=0.1).succeeded
        assert b"".join(run.logs()) == b"from the repo\r\n"


def test_from_config_refuses_a_missing_repo_dir(config: Path, home: Path) -> None:
    with pytest.raises(dstack.ConfigurationError, match=r"repo_dir: expected a directory, got '.*nowhere'"):
        dstack.Client.from_config(home / "nowhere")


def test_from_config_makes_no_request_and_writes_nothing(bench: Bench, config: Path, home: Path) -> None:
    requests, files = len(bench.server.requests), sorted(home.rglob("*"))
    for init in (True, False):
        dstack.Client.from_config(home, init=init)
    assert (len(bench.server.requests), sorted(home.rglob("*"))) == (requests, files)


def test_runs_is_a_run_collection(bench: Bench) -> None:
    assert isinstance(bench.client.runs, dstack.RunCollection)


def test_the_token_is_in_no_repr(bench: Bench) -> None:
    assert bench.server.token not in repr(bench.client)
