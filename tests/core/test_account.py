"""Users, projects, backends, events and metrics, read from the replies of five server generations."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dstack_core import errors
from dstack_core._operations import Operations
from dstack_core._wire.api import Api
from dstack_core._wire.runs import parse_run
from tests.core.scripted import Driver, Script, recorded, recorded_reply, reply, run_json

API = Api("http://server", "main")
VERSIONS = ["0.18.44", "0.19.40", "0.20.24", "0.21.5", "0.22.5"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_user_is_returned_without_token_and_keys(version: str) -> None:
    user = API.get_user().parse(recorded_reply(f"users_get_my_user_{version}"))
    body = recorded(f"users_get_my_user_{version}")
    assert (user.id, user.name, user.global_role) == (body["id"], "admin", "admin")
    assert user.created_at is not None
    assert user.created_at.utcoffset() == timedelta(0)
    for secret in [*(body.get("creds") or {}).values(), "PRIVATE KEY"]:
        assert secret not in repr(user)
    assert "ssh-rsa" not in repr(user)


@pytest.mark.parametrize("version", VERSIONS)
def test_projects(version: str) -> None:
    listed = API.list_projects().parse(recorded_reply(f"projects_list_{version}"))
    project = API.get_project("main").parse(recorded_reply(f"projects_get_{version}"))
    assert [item.name for item in listed] == ["main"]
    assert (project.name, project.owner.name, project.is_public) == ("main", "admin", False)
    assert [(member.user.name, member.role) for member in project.members] == [("admin", "admin")]
    assert "ssh-rsa" not in repr(project)


def test_backends_are_named_without_their_settings() -> None:
    project = API.get_project("main").parse(recorded_reply("projects_get_0.22.5"))
    assert [(backend.name, backend.type) for backend in project.backends] == [("slurm", "slurm")]
    assert "partitions" not in repr(project.backends)


def test_the_error_for_an_unknown_project_names_it() -> None:
    with pytest.raises(errors.ProjectNotFoundError, match="no project 'nope'"):
        API.get_project("nope").parse(recorded_reply("error_404_project_0.22.5"))


def test_a_recorded_page_of_events() -> None:
    events = API.list_events("id", limit=3, after=None).parse(recorded_reply("events_list_0.22.5"))
    assert [event.message for event in events][:2] == [
        "Instance status changed TERMINATING -> TERMINATED",
        "Job unassigned from instance. Instance blocks: 0/1 busy",
    ]
    assert events[0].recorded_at == datetime(2026, 11, 23, 9, 24, 6, 357732, tzinfo=UTC)
    assert events[0].actor is None
    assert [target["type"] for target in events[1].targets] == ["job", "instance"]


def event(number: int) -> dict[str, Any]:
    moment = datetime(2026, 11, 23, tzinfo=UTC) + timedelta(seconds=number)
    return {"id": f"e{number}", "message": str(number), "recorded_at": moment.isoformat(), "actor_user": "me"}


class Events:
    """A server's pages of events: newest first, each page starting after the previous one."""

    def __init__(self, count: int) -> None:
        self.kept = [event(number) for number in range(count)][::-1]

    def __call__(self, body: dict[str, Any]) -> Any:
        assert body["within_runs"] == ["id-1"]
        ids = [item["id"] for item in self.kept]
        start = ids.index(body["prev_id"]) + 1 if "prev_id" in body else 0
        return reply(self.kept[start : start + body["limit"]])


@pytest.mark.parametrize(
    ("count", "limit", "first", "requests"),
    [(0, None, None, 1), (30, None, 0, 1), (100, None, 0, 2), (250, None, 0, 3), (250, 120, 130, 2), (5, 9, 0, 1)],
)  # fmt: skip
def test_events_come_oldest_first_across_pages(
    driver: Driver, count: int, limit: int | None, first: int | None, requests: int
) -> None:
    script = Script(events__list=[Events(count)])
    events = driver.run(Operations(API, 30.0, clock=driver.clock).events("id-1", limit), script)
    expected = list(range(count))[-limit:] if limit else list(range(count))
    assert [int(item.message) for item in events] == expected
    assert (expected[0] if expected else None) == first
    assert len(script.requests) == requests


def test_recorded_metrics_and_their_order(driver: Driver) -> None:
    call = API.get_metrics("run", "id-1", node=1, replica=2, limit=5)
    assert (call.request.method, call.request.body) == ("GET", None)
    assert call.request.path == (
        "/api/project/main/metrics/job/run?run_id=id-1&replica_num=2&job_num=1&limit=5"
    )
    metrics = {metric.name: metric for metric in call.parse(recorded_reply("metrics_job_0.22.5"))}
    assert metrics["memory_usage_bytes"].values == (10485760.0,)
    assert metrics["cpu_usage_percent"].timestamps == (datetime(2026, 11, 23, 9, 22, 43, 855566, tzinfo=UTC),)
    newest_first = {
        "name": "cpu_usage_percent",
        "timestamps": ["2026-11-23T16:29:35Z", "2026-11-23T16:29:25Z"],
        "values": [9, 1],
    }
    (metric,) = call.parse(reply({"metrics": [newest_first]}))
    assert metric.values == (1.0, 9.0)
    assert metric.timestamps[0] < metric.timestamps[1]


def test_the_error_for_metrics_of_a_missing_job_names_node_and_replica() -> None:
    body = {"detail": [{"msg": "Found no job with given parameters", "code": "resource_not_exists"}]}
    with pytest.raises(errors.RunNotFoundError, match=r"run train\) has no node 3 in replica 0"):
        API.get_metrics("train", "id-1", node=3, replica=0, limit=1).parse(reply(body, 400))


@pytest.mark.parametrize("limit", [0, -1, True, "3"])
def test_an_invalid_limit_is_refused(driver: Driver, limit: Any) -> None:
    session, script = Operations(API, 30.0), Script()
    with pytest.raises(
        errors.ConfigurationError, match=r"limit: expected a number above 0, or None for all, got"
    ):
        driver.run(session.events("id-1", limit), script)
    with pytest.raises(errors.ConfigurationError, match="limit: "):
        session.metrics(parse_run(run_json()), node=0, replica=0, limit=limit)
    assert script.requests == []
