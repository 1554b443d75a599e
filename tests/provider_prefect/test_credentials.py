"""The credentials block."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import pytest
from prefect.blocks.core import Block
from prefect.testing.standard_test_suites import BlockStandardTestSuite  # type: ignore[attr-defined]
from pydantic import ValidationError

from dstack_core import AsyncClient, Client, ConfigurationError, ProjectNotConfiguredError
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, credentials
from prefect_dstack.credentials import load, open_async_client, open_client

TOKEN = "s3cr3t-t0k3n"
GOOD: dict[str, Any] = {"server_url": "http://localhost:3000", "project_name": "main", "user_token": TOKEN}


class TestStandard(BlockStandardTestSuite):
    @pytest.fixture
    def block(self) -> type[Block]:
        return DstackCredentials

    # The suite's own test of the logo fetches it from the internet.
    def test_has_a_valid_image(self, block: type[Block]) -> None:
        assert str(block._logo_url).startswith("https://")


def test_clients_are_made_of_the_fields() -> None:
    block = DstackCredentials(**GOOD)
    for client in (block.get_client(), block.get_async_client()):
        assert client.server_url == "http://localhost:3000"
        assert client.project == "main"


def test_the_token_is_not_shown() -> None:
    block = DstackCredentials(**GOOD)
    shown = f"{block!r} {block} {block.model_dump()} {block.model_dump_json()} {block.get_client()!r}"
    assert TOKEN not in shown


@pytest.mark.parametrize(
    ("field", "value"), [("server_url", "localhost:3000"), ("project_name", ""), ("user_token", "")]
)
def test_a_wrong_value_is_named_without_the_secret(field: str, value: str) -> None:
    with pytest.raises(ValidationError, match=field) as caught:
        DstackCredentials(**{**GOOD, field: value})
    assert TOKEN not in str(caught.value)


def test_a_token_of_a_wrong_type_is_not_shown() -> None:
    with pytest.raises(ValidationError) as caught:
        DstackCredentials(**{**GOOD, "user_token": {"value": TOKEN}})
    assert TOKEN not in str(caught.value)


def test_a_type_checker_knows_the_fields() -> None:
    tree = ast.parse(inspect.getsource(credentials))
    (init,) = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    ]
    declared = {
        argument.arg: default is None
        for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
    }
    fields = {name: field.is_required() for name, field in DstackCredentials.model_fields.items()}
    assert declared == fields


def test_it_can_be_pickled_after_use() -> None:
    block = DstackCredentials(**GOOD, verify="/etc/ca.pem")
    block.get_client().close()
    copy = cloudpickle.loads(cloudpickle.dumps(block))
    assert copy == block
    assert copy.user_token.get_secret_value() == TOKEN


@pytest.mark.parametrize("wrong", [{"server_url": "x"}, 3, object()])
def test_anything_but_credentials_is_refused(wrong: object) -> None:
    with pytest.raises(ConfigurationError, match="credentials"):
        load(wrong)  # type: ignore[arg-type]


def test_without_credentials_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProjectNotConfiguredError):
        open_client(None)
    for name, value in zip(("SERVER_URL", "PROJECT", "TOKEN"), GOOD.values(), strict=True):
        monkeypatch.setenv(f"DSTACK_{name}", value)
    client = open_client(load(None))
    assert isinstance(client, Client)
    assert client.project == "main"
    assert isinstance(open_async_client(None), AsyncClient)


@pytest.mark.usefixtures("prefect_server")
def test_a_saved_block_is_found_by_name(dstack: LocalServer, credentials: DstackCredentials) -> None:
    credentials.save("test-block", overwrite=True)
    loaded = load("test-block")
    assert loaded is not None
    assert loaded.user_token.get_secret_value() == dstack.token
    with loaded.get_client() as client:
        assert client.runs.list() == []
    with pytest.raises(ConfigurationError, match="got 'no-such-block', which does not exist"):
        load("no-such-block")


@pytest.mark.parametrize("value", ["x", 3, ["team"]])
def test_wrong_default_tags_are_one_error(value: Any) -> None:
    with pytest.raises(ValidationError, match="default_tags") as caught:
        DstackCredentials.model_validate(
            {"server_url": "http://a", "project_name": "p", "user_token": "t", "default_tags": value}
        )
    (error,) = caught.value.errors()
    assert error["msg"] == (
        f'Value error, expected a dict such as {{"team": "ml"}}, or False for no tags, got {value!r}.'
    )
