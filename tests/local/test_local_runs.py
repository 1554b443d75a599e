"""Submitting again, replacing, listing, deleting, and paging through logs and events."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest

from tests.local.support import Api, task, wait_until

MESSAGES = {
    "Cannot delete active runs: ['{name}']",
    "Failed to apply plan. Resource has been changed. Try again or use force apply.",
}


def _apply(api: Api, spec: Any, force: bool = False, current: Any = None) -> Any:
    body = {"plan": {"run_spec": spec, "current_resource": current}, "force": force}
    reply = api.call("{p}/runs/apply", body)
    return reply.json() if reply.status_code == 200 else (reply.status_code, reply.json()["detail"][0]["msg"])


def test_active_run_is_updated_in_place_only_when_expected(api: Api, name: str) -> None:
    spec, other = task(name, "echo pid $$; sleep 300"), task(name, "echo other")
    first = _apply(api, spec)
    api.wait_output(name, "pid")
    current = api.get(name)
    changed = (400, "Failed to apply plan. Resource has been changed. Try again or use force apply.")
    override = (400, "Cannot override active run. Stop the run first.")
    assert _apply(api, spec) == changed
    assert _apply(api, spec, current={**current, "id": str(uuid4())}) == changed
    assert _apply(api, other) == override
    assert _apply(api, other, force=True) == override
    assert _apply(api, other, current=current) == override
    for number, options in enumerate(({"current": current}, {"force": True}), 1):
        again = _apply(api, spec, **options)
        assert (again["id"], again["deployment_num"]) == (first["id"], number)
        assert again["latest_job_submission"]["deployment_num"] == number
        assert len(again["jobs"][0]["job_submissions"]) == 1
    assert api.output(api.get(name)).count("pid") == 1
    api.stop(name, abort=True)
    api.wait(name)


def test_terminating_run_is_never_overridden(make: Callable[..., Api]) -> None:
    api = make(stop_grace_seconds=60)
    spec = task("ending", "trap '' INT; echo ready; sleep 300")
    _apply(api, spec)
    api.wait_output("ending", "ready")
    api.stop("ending")
    assert _apply(api, spec, force=True) == (400, "Cannot override active run. Stop the run first.")


@pytest.mark.parametrize("command", ["true", "exit 1"])
def test_finished_run_is_replaced(api: Api, name: str, command: str) -> None:
    old = api.run(name, "echo old", command)
    new = api.run(name, "echo new")
    assert new["id"] != old["id"]
    assert api.get(name)["id"] == new["id"]
    gone = api.ok("{p}/runs/get", {"id": old["id"]})
    assert (gone["deleted"], gone["status"]) == (True, old["status"])
    assert api.output(gone) == "old\r\n"
    assert api.output(new) == "new\r\n"


def test_one_of_many_simultaneous_applies_wins(api: Api, name: str) -> None:
    barrier, replies = threading.Barrier(6), []

    def submit() -> None:
        own = Api(api.server)
        barrier.wait()
        replies.append(_apply(own, task(name, "sleep 300")))

    threads = [threading.Thread(target=submit) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [reply for reply in replies if isinstance(reply, tuple)]
    assert len(refused) == 5
    allowed = {message.format(name=name) for message in MESSAGES}
    assert all(status == 400 and message in allowed for status, message in refused)
    listed = api.ok("runs/list", {})
    assert len([run for run in listed if run["run_spec"]["run_name"] == name]) == 1
    api.stop(name, abort=True)
    api.wait(name)


def test_name_is_generated_or_checked(api: Api) -> None:
    run = api.apply(None, "true")
    assert len(run["run_spec"]["run_name"]) > 2
    for bad in ("A", "a", "1a", "a_b", "a" * 42, "a\n"):
        status, message = _apply(api, task(bad, "true"))
        assert (status, message) == (400, "Resource name should match regex '^[a-z][a-z0-9-]{1,40}$'")


def test_marker_is_stored_unchanged(api: Api, name: str) -> None:
    run = api.apply(name, "true", spec={"configuration_path": "airflow:dag/run/task/1"})
    assert run["run_spec"]["configuration_path"] == "airflow:dag/run/task/1"


def test_get_by_unknown_name_or_id(api: Api) -> None:
    for body in ({"run_name": "never-was"}, {"id": str(uuid4())}, {}):
        reply = api.call("{p}/runs/get", body)
        assert (reply.status_code, reply.json()["detail"][0]["code"]) == (400, "resource_not_exists")


def test_deleted_run_is_hidden_from_its_name_only(api: Api, name: str) -> None:
    run = api.run(name, "echo kept")
    assert api.ok("{p}/runs/delete", {"runs_names": [name, "never-was"]}) is None
    assert api.call("{p}/runs/get", {"run_name": name}).status_code == 400
    gone = api.ok("{p}/runs/get", {"id": run["id"]})
    assert gone["deleted"] is True
    assert api.output(gone) == "kept\r\n"


def test_list_pages_and_filters(make: Callable[..., Api]) -> None:
    api = make()
    for number in range(5):
        api.run(f"list-{number}", "true")
    api.run("list-0", "echo replaced")
    api.apply("list-active", "sleep 300")
    names = [run["run_spec"]["run_name"] for run in api.ok("runs/list", {})]
    assert names == ["list-active", "list-0", "list-4", "list-3", "list-2", "list-1", "list-0"]
    for ascending in (False, True):
        seen: list[str] = []
        page: dict[str, Any] = {"limit": 2, "ascending": ascending}
        while runs := api.ok("runs/list", page):
            seen += [run["run_spec"]["run_name"] for run in runs]
            page |= {"prev_submitted_at": runs[-1]["submitted_at"], "prev_run_id": runs[-1]["id"]}
        assert seen == (names[::-1] if ascending else names)
    active = api.ok("runs/list", {"only_active": True})
    assert [run["run_spec"]["run_name"] for run in active] == ["list-active"]
    assert api.ok("runs/list", {"project_name": "other"}) == []
    assert api.ok("runs/list", {"username": "nobody"}) == []
    assert api.ok("runs/list", {"limit": 0}) == []
    assert len(api.ok("runs/list", {"project_name": "main", "repo_id": "none"})) == 7
    assert api.call("runs/list", {"project_name": "main", "repo_id": "x"}).status_code == 400
    bare = api.ok("runs/list", {"include_jobs": False, "limit": 1})[0]
    assert (bare["jobs"], bare["latest_job_submission"]) == ([], None)


def test_list_limits_job_submissions(api: Api, name: str) -> None:
    api.apply(name, "exit 1", retry=True)
    wait_until(lambda: len(api.get(name)["jobs"][0]["job_submissions"]) > 1)
    api.stop(name)
    tries = api.wait(name)["jobs"][0]["job_submissions"]
    for limit in (0, 1):
        runs = api.ok("runs/list", {"job_submissions_limit": limit})
        run = next(run for run in runs if run["run_spec"]["run_name"] == name)
        expected = tries[len(tries) - limit :]
        assert run["jobs"][0]["job_submissions"] == expected
        assert run["latest_job_submission"] == (expected[-1] if expected else None)


@pytest.fixture
def printed(api: Api, name: str) -> Any:
    """Return a finished run with twelve separate log messages."""
    return api.run(name, "for i in 0 1 2 3 4 5 6 7 8 9 10 11; do echo $i; sleep 0.02; done")


def _poll(api: Api, run: Any, **options: Any) -> Any:
    key = run["latest_job_submission"]["id"]
    return api.ok(
        "{p}/logs/poll", {"run_name": run["run_spec"]["run_name"], "job_submission_id": key, **options}
    )


def test_logs_have_growing_timestamps_and_an_exclusive_start(api: Api, printed: Any) -> None:
    logs = _poll(api, printed)["logs"]
    times = [message["timestamp"] for message in logs]
    assert times == sorted(set(times))
    assert len(logs) > 3
    assert _poll(api, printed, start_time=times[2])["logs"] == logs[3:]
    assert _poll(api, printed, start_time=times[-1])["logs"] == []
    assert _poll(api, printed, end_time=times[2])["logs"] == logs[:2]


@pytest.mark.parametrize("descending", [False, True])
def test_logs_are_paged_by_token(api: Api, printed: Any, descending: bool) -> None:
    everything = _poll(api, printed)["logs"]
    pages, token = [], None
    while True:
        page = _poll(api, printed, limit=2, next_token=token, descending=descending)
        assert 0 < len(page["logs"]) <= 2
        pages += page["logs"]
        token = page["next_token"]
        if token is None:
            break
    assert pages == (everything[::-1] if descending else everything)


def test_logs_of_odd_requests(api: Api, printed: Any) -> None:
    assert len(_poll(api, printed, limit=0)["logs"]) == 1
    empty: Any = {"logs": [], "external_url": None, "next_token": None}
    assert _poll(api, printed, diagnose=True) == empty
    asked = {"run_name": "never-was", "job_submission_id": str(uuid4())}
    assert api.ok("{p}/logs/poll", asked) == empty
    bad = {**asked, "next_token": "what?"}
    assert api.call("{p}/logs/poll", bad).status_code == 400
    for wrong in ({"limit": 1001}, {"job_submission_id": "x"}):
        assert api.call("{p}/logs/poll", {**asked, **wrong}).status_code == 422


def test_logs_can_be_followed_while_the_job_runs(api: Api, name: str) -> None:
    api.apply(name, "echo one", "sleep 300")
    run = api.wait_output(name, "one")
    assert run["status"] == "running"
    assert _poll(api, run)["next_token"] is None
    api.stop(name, abort=True)
    assert api.output(api.wait(name)) == "one\r\n"


def test_events_record_every_status_of_a_run(api: Api, name: str) -> None:
    run = api.run(name, "exit 3")
    story = api.ok("events/list", {"target_runs": [run["id"]], "ascending": True})
    assert [event["message"] for event in story] == [
        "Run status changed SUBMITTED -> PROVISIONING",
        "Run status changed PROVISIONING -> RUNNING",
        "Run status changed RUNNING -> TERMINATING. Termination reason: JOB_FAILED",
        "Run status changed TERMINATING -> FAILED",
    ]
    within = api.ok("events/list", {"within_runs": [run["id"]]})
    assert {event["targets"][0]["type"] for event in within} == {"run", "job"}
    page = api.ok("events/list", {"within_runs": [run["id"]], "limit": 2})
    rest = {"prev_recorded_at": page[-1]["recorded_at"], "prev_id": page[-1]["id"]}
    assert page + api.ok("events/list", {"within_runs": [run["id"]], **rest}) == within


def test_plan_reports_what_apply_would_do(api: Api, name: str) -> None:
    spec = task(name, "sleep 300")
    assert api.ok("{p}/runs/get_plan", {"run_spec": spec})["action"] == "create"
    run = _apply(api, spec)
    plan = api.ok("{p}/runs/get_plan", {"run_spec": spec})
    assert (plan["action"], plan["current_resource"]["id"]) == ("update", run["id"])
    assert _apply(api, spec, current=plan["current_resource"])["id"] == run["id"]
    assert api.ok("{p}/runs/get_plan", {"run_spec": task(name, "echo other")})["action"] == "create"
    api.stop(name, abort=True)
    api.wait(name)
    plan = api.ok("{p}/runs/get_plan", {"run_spec": spec})
    assert (plan["action"], plan["current_resource"]["id"]) == ("create", run["id"])


@pytest.mark.parametrize("left_out", ["groups", "env", "single_branch"])
def test_an_update_compares_what_a_run_means_not_which_defaults_are_written(
    api: Api, name: str, left_out: str
) -> None:
    spec = task(name, "sleep 300")
    _apply(api, spec)
    current = api.ok("{p}/runs/get_plan", {"run_spec": spec})["current_resource"]
    del current["run_spec"]["configuration"][left_out]
    spec["configuration"]["priority"] = 2
    assert _apply(api, spec, current=current)["run_spec"]["configuration"]["priority"] == 2
    spec["configuration"]["priority"] = 3
    body = {"plan": {"run_spec": spec, "current_resource": current}, "force": False}
    reply = api.call("{p}/runs/apply", body)
    assert (reply.status_code, "Resource has been changed" in reply.text) == (400, True)
    api.stop(name, abort=True)
