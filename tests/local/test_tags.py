"""Tags on the embedded server: kept with a run, and never changed in place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dstack_core import Client, RunNotUpdatableError
from dstack_core.local import LocalServer


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with LocalServer() as found:
        yield found


def test_the_embedded_server_keeps_tags_and_an_update_changes_none(server: LocalServer) -> None:
    """What differs between two submissions, such as the id of a DAG run, must not prevent an update."""
    made: list[str] = []
    for number, port in (("1", 80), ("2", 81)):
        with Client(
            server_url=server.url,
            project_name=server.project,
            user_token=server.token,
            default_tags={"airflow-run": number},
        ) as client:
            service = {"type": "service", "port": port, "commands": ["sleep 60"], "tags": {"team": "ml"}}
            made.append(client.runs.apply(service, run_name="chat").id)
    assert made[0] == made[1]
    (run,) = server.client().runs.list()
    assert run.deployment_num == 1
    assert run.tags == {"airflow-run": "1", "team": "ml"}
    # The server itself updates no tags, which is why a client keeps them.
    with pytest.raises(RunNotUpdatableError, match="tags"), server.client() as other:
        other.runs.apply({**service, "tags": {"team": "web"}}, run_name="chat")
