"""The connection, and what its test button shows."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from airflow_provider_dstack._compat import AirflowFailException
from airflow_provider_dstack.hooks import DstackHook
from dstack_core.local import LocalServer


@pytest.fixture
def other_service() -> Iterator[str]:
    """Serve something that is not a dstack server."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def define(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> DstackHook:
    monkeypatch.setenv("AIRFLOW_CONN_MINE", json.dumps({"conn_type": "dstack", **fields}))
    return DstackHook("mine")


@pytest.mark.parametrize(
    ("fields", "url"),
    [
        ({"host": "http://localhost:3000/"}, "http://localhost:3000"),
        ({"host": "localhost:3000"}, "http://localhost:3000"),
        ({"host": "127.0.0.1", "port": 3000}, "http://127.0.0.1:3000"),
        ({"host": "https://dstack.example.com", "port": 8443}, "https://dstack.example.com:8443"),
        ({"host": "dstack.example.com"}, "https://dstack.example.com"),
        ({"host": "dstack.example.com", "schema": "http"}, "http://dstack.example.com"),
    ],
)
def test_the_host_is_the_servers_url(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], url: str
) -> None:
    hook = define(monkeypatch, **fields, login="main", password="secret-token")
    client = hook.get_conn()
    assert (client.server_url, client.project) == (url, "main")
    assert "secret-token" not in repr(client)


def test_a_connection_may_be_a_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_MINE", "dstack://main:secret-token@http%3A%2F%2Flocalhost%3A3000/")
    client = DstackHook("mine").get_conn()
    assert (client.server_url, client.project) == ("http://localhost:3000", "main")


def test_the_project_is_an_argument_or_in_the_extra_or_the_login(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"host": "http://h", "password": "t-token", "login": "one", "extra": {"project": "two"}}
    assert define(monkeypatch, **fields).project == "two"
    assert DstackHook("mine", project_name="three").project == "three"
    assert define(monkeypatch, **{**fields, "extra": {}}).project == "one"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"login": "p", "password": "t"}, "expected a server URL, got none"),
        ({"host": "http://h", "password": "t"}, "expected a project, got none"),
        ({"host": "http://h", "login": "p"}, "expected a token, got none"),
        ({"host": "ftp://h", "login": "p", "password": "t"}, "ftp://h"),
        ({"host": "http://h", "login": "p", "password": "t", "extra": {"timeout": "soon"}}, "soon"),
    ],
)
def test_an_incomplete_connection_is_reported(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], told: str
) -> None:
    hook = define(monkeypatch, **fields)
    with pytest.raises(AirflowFailException, match=told):
        hook.get_conn()
    assert hook.test_connection()[0] is False


def test_a_missing_connection_is_reported(database: object) -> None:
    with pytest.raises(AirflowFailException, match="got none called 'nobody'"):
        DstackHook("nobody").get_conn()


def test_the_test_button_shows_what_is_wrong(
    wrong_connections: LocalServer, other_service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = wrong_connections
    assert DstackHook().test_connection() == (True, f"Connected to project main on {server.url}")
    expected = {
        "bad_token": "Wrong token",
        "bad_project": "No such project",
        "bad_url": "Wrong server URL",
        "no_token": "expected a token, got none",
        "no_project": "expected a project, got none",
    }
    for name, told in expected.items():
        good, message = DstackHook(name).test_connection()
        assert (good, told in message) == (False, True), message
        assert server.token not in message
        assert "not-the-token" not in message
    elsewhere = define(monkeypatch, host=other_service, login="main", password="t-token")
    good, message = elsewhere.test_connection()
    assert (good, "Wrong server URL" in message) == (False, True), message


def test_the_extra_sets_limits_and_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"host": "https://h", "login": "p", "password": "t-token"}
    hook = define(monkeypatch, **fields, extra={"timeout": 7, "verify": False})
    arguments = hook.client_arguments()
    assert (arguments["timeout"], arguments["verify"]) == (7.0, False)
    hook = define(monkeypatch, **fields, extra={"ca_bundle": "/etc/ca.pem", "verify": True})
    assert hook.client_arguments()["verify"] == "/etc/ca.pem"
    assert define(monkeypatch, **fields).client_arguments()["verify"] is True


def test_the_extra_has_the_address_for_browsers(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"host": "http://dstack:3000", "login": "p", "password": "t-token"}
    client = define(monkeypatch, **fields, extra={"ui_url": "https://gpu.example.com/"}).get_conn()
    assert (client.server_url, client.ui_url) == ("http://dstack:3000", "https://gpu.example.com")
    assert client.run_url("7") == "https://gpu.example.com/projects/p/runs/7"
    assert define(monkeypatch, **fields).get_conn().run_url() == "http://dstack:3000/runs"
    with pytest.raises(AirflowFailException, match=r"'mine': ui_url: expected an address .*, got 'gpu'"):
        define(monkeypatch, **fields, extra={"ui_url": "gpu"}).get_conn()
    with pytest.raises(AirflowFailException, match=r"ui_url: expected an address without a user"):
        define(monkeypatch, **fields, extra={"ui_url": "https://u:p@x.y"}).get_conn()


@pytest.mark.parametrize(
    ("extra", "tags"),
    [
        (None, {"airflow-dag": "etl"}),
        ("", {"airflow-dag": "etl"}),
        ({"team": "ml"}, {"airflow-dag": "etl", "team": "ml"}),
        ({"airflow-dag": "mine"}, {"airflow-dag": "mine"}),
        ('{"team": "ml"}', {"airflow-dag": "etl", "team": "ml"}),
        (False, None),
        ("false", None),
    ],
)
def test_the_extra_has_tags_for_every_run(monkeypatch: pytest.MonkeyPatch, extra: Any, tags: Any) -> None:
    fields = {"host": "http://h", "login": "p", "password": "t-token"}
    hook = define(monkeypatch, **fields, extra={} if extra is None else {"default_tags": extra})
    assert hook.client_arguments(automatic_tags={"airflow-dag": "etl"}).get("default_tags") == tags
    hook.client_with_code(automatic_tags={"airflow-dag": "etl"}).close()


@pytest.mark.parametrize(("extra", "told"), [({"a b": "c"}, "'a b'"), ("team", "'team'"), ([1], r"\[1\]")])
def test_wrong_tags_in_the_extra_are_reported(monkeypatch: pytest.MonkeyPatch, extra: Any, told: str) -> None:
    hook = define(monkeypatch, host="http://h", login="p", password="t-token", extra={"default_tags": extra})
    for make in (hook.get_conn, hook.client_with_code, hook.async_client):
        with pytest.raises(AirflowFailException, match=f"'mine': default_tags: expected .*got {told}"):
            make()


def test_requests_to_a_service_contain_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"host": "http://h", "login": "p"}
    hook = define(monkeypatch, **fields, password="secret-token")
    assert hook.headers() == {"Authorization": "Bearer secret-token"}
    with pytest.raises(AirflowFailException, match="expected a token, got none"):
        define(monkeypatch, **fields).headers()
