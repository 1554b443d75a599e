"""Tags and pages of a run, on both servers; an old server gets a run without the tags that it can do without."""

from __future__ import annotations

import pytest
import requests

import dstack_core as dstack
from tests.contract.conftest import Target
from tests.contract.test_contract import name

TAGS = {"airflow-dag": "etl", "airflow-run": "scheduled__2026-11-23t12-00"}


def test_the_server_keeps_the_tags_and_an_update_changes_none(target: Target) -> None:
    wanted = name()
    has_tags = target.release >= (0, 19, 5)
    service = target.task("sleep 600") | {"type": "service", "port": 80, "auth": False, "name": wanted}
    with target.client(default_tags=TAGS) as client:
        run = client.runs.apply(service)
    try:
        assert run.tags == (TAGS if has_tags else {})
        assert (run.metrics_url is None, run.logs_url == run.url) == (not has_tags, not has_tags)
        with target.client(default_tags={**TAGS, "airflow-run": "another"}) as client:
            again = client.runs.apply(service)
            assert (again.id, again.tags) == (run.id, run.tags)
            if has_tags:
                with pytest.raises(dstack.RunNotUpdatableError, match="tags"):
                    client.runs.apply(service, tags={"team": "ml"})
            else:
                with pytest.raises(dstack.UnsupportedServerError, match=r"tags: needs dstack >= 0\.19\.5"):
                    client.runs.apply(service, tags={"team": "ml"})
    finally:
        target.stop(run)


def test_a_tag_that_the_client_refuses_is_refused_by_the_server(target: Target) -> None:
    """The client's check is not stricter than the server's."""
    if target.release < (0, 19, 5):
        pytest.skip("older servers have no tags")
    for tags in ({"a b": "c"}, {"k" * 61: "c"}, {"team": "ü"}, {"team": "x" * 257}):
        with pytest.raises(dstack.ConfigurationError, match=r"^tags: expected"), target.client() as client:
            client.runs.submit(target.task("true"), tags=tags)
        spec = {"run_name": name(), "configuration": {"type": "task", "commands": ["true"], "tags": tags}}
        reply = requests.post(
            f"{target.url}/api/project/{target.project}/runs/apply",
            json={"plan": {"run_spec": spec}, "force": False},
            headers={"Authorization": f"Bearer {target.token}"},
            timeout=60,
        )
        assert reply.status_code == 422, reply.text


def test_what_a_server_takes_the_client_takes(target: Target, client: dstack.Client) -> None:
    if target.release < (0, 19, 5):
        pytest.skip("older servers have no tags")
    tags = {"Team_1-x": "a B.:/=_-+@", "empty": "", "k" * 60: "v" * 256}
    run = client.runs.submit(target.task("true"), name(), tags=tags)
    assert run.tags == tags
    target.stop(run)
