"""Replies are compared with those of a real 0.22.5 server: same keys, same types, same important values."""

from __future__ import annotations

from typing import Any

import pytest

from tests.local.support import Api, differences, recording, task, wait_until


def _spec(recorded: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the recorded run spec with another name; the server must accept what it stores."""
    spec = recorded["response"]["json"]["run_spec"]
    return {**spec, "run_name": name, "ssh_key_pub": "ssh-rsa AAAA test"}


def _apply(api: Api, recorded: dict[str, Any], name: str, **changes: Any) -> None:
    spec = _spec(recorded, name)
    spec["configuration"] = {**spec["configuration"], **changes}
    api.ok("{p}/runs/apply", {"plan": {"run_spec": spec}, "force": False})


def _same_values(ours: Any, recorded: Any) -> None:
    for key in ("status", "status_message", "termination_reason", "error", "deleted", "service"):
        assert ours[key] == recorded[key], key
    assert (ours["fleet"] is None) == (recorded["fleet"] is None)
    mine, theirs = (run["jobs"][0]["job_submissions"][0] for run in (ours, recorded))
    keys = ("status", "status_message", "termination_reason", "exit_status", "error", "submission_num")
    assert {key: mine[key] for key in keys} == {key: theirs[key] for key in keys}
    assert (mine["finished_at"] is None) == (theirs["finished_at"] is None)
    message, expected = (one["termination_reason_message"] for one in (mine, theirs))
    # The message of missing capacity names the fleet.
    assert (message or "").replace("'local'", "'rig'") == (expected or "")
    assert (message is None) == (expected is None)


@pytest.mark.parametrize("case", ["runs_apply_minimal", "runs_apply_e2e", "apply_finished_same_name"])
def test_apply_answers_like_the_recording(api: Api, name: str, case: str) -> None:
    recorded = recording(f"{case}_0.22.5")
    body = recorded["request"]["json"]
    body["plan"]["run_spec"] |= {"run_name": name, "ssh_key_pub": "key"}
    ours, theirs = api.ok("{p}/runs/apply", body), recorded["response"]["json"]
    assert differences(ours, theirs) == []
    assert ours["run_spec"] == {**theirs["run_spec"], "run_name": name, "ssh_key_pub": "key"}
    mine, expected = (run["jobs"][0]["job_spec"] for run in (ours, theirs))
    assert mine["commands"][-1] in expected["commands"][-1]
    assert {**mine, "commands": [], "job_name": ""} == {**expected, "commands": [], "job_name": ""}
    assert mine["job_name"] == f"{name}-0-0"
    _same_values(ours, theirs)


def test_service_answers_like_the_recording(api: Api) -> None:
    recorded = recording("runs_apply_service_0.22.5")
    ours, theirs = api.ok("{p}/runs/apply", recorded["request"]["json"]), recorded["response"]["json"]
    assert differences(ours, theirs) == []
    assert ours["run_spec"]["configuration"] == theirs["run_spec"]["configuration"]
    assert ours["service"] == theirs["service"]
    assert ours["jobs"][0]["job_spec"]["service_port"] == 18099
    api.stop("svc-25767", abort=True)
    api.wait("svc-25767")


@pytest.mark.parametrize("case", ["done_e2e", "failed_e2e", "done", "failed", "max_duration", "no_capacity"])
def test_finished_run_reads_like_the_recording(api: Api, name: str, case: str) -> None:
    recorded = recording(f"runs_get_{case}_0.22.5")
    changes: dict[str, Any] = {"max_duration": "1s"} if case == "max_duration" else {}
    if case.startswith("done"):
        changes["commands"] = ["echo hello", "echo bye"]
    _apply(api, recorded, name, **changes)
    ours = api.wait(name)
    assert differences(ours, recorded["response"]["json"]) == []
    _same_values(ours, recorded["response"]["json"])


@pytest.mark.parametrize(("case", "abort"), [("stopped", False), ("aborted", True)])
def test_stopped_run_reads_like_the_recording(api: Api, name: str, case: str, abort: bool) -> None:
    recorded = recording(f"runs_get_{case}_0.22.5")
    _apply(api, recorded, name)
    api.wait_output(name, "start")
    api.stop(name, abort)
    ours = api.wait(name)
    assert differences(ours, recorded["response"]["json"]) == []
    _same_values(ours, recorded["response"]["json"])


def test_running_run_reads_like_the_recording(api: Api, name: str) -> None:
    recorded = recording("runs_get_running_ssh_fleet_0.22.5")
    _apply(api, recorded, name, commands=["sleep 300"])
    ours = api.wait(name, "running")
    assert differences(ours, recorded["response"]["json"]) == []
    _same_values(ours, recorded["response"]["json"])
    api.stop(name, abort=True)


def test_retried_run_reads_like_the_recording(api: Api, name: str) -> None:
    recorded = recording("runs_get_retry_error_0.22.5")
    _apply(api, recorded, name)

    def tried_twice() -> Any:
        run = api.get(name)
        return run if len(run["jobs"][0]["job_submissions"]) > 2 else None

    ours = wait_until(tried_twice)
    api.stop(name)
    assert differences(ours, recorded["response"]["json"]) == []
    first, expected = (run["jobs"][0]["job_submissions"][0] for run in (ours, recorded["response"]["json"]))
    for key in ("status", "status_message", "termination_reason", "termination_reason_message"):
        assert first[key] == expected[key]
    assert [one["submission_num"] for one in ours["jobs"][0]["job_submissions"]][:3] == [0, 1, 2]
    assert ours["jobs"][0]["job_spec"]["retry"] == {"on_events": ["error"], "duration": 30}


def test_retry_limit_reads_like_the_recording(api: Api, name: str) -> None:
    recorded = recording("runs_get_retry_no_capacity_0.22.5")
    _apply(api, recorded, name, retry={"on_events": ["no-capacity"], "duration": 0})
    ours = api.wait(name)
    assert differences(ours, recorded["response"]["json"]) == []
    _same_values(ours, recorded["response"]["json"])


def test_replaced_run_reads_like_the_recording(api: Api, name: str) -> None:
    recorded = recording("get_by_id_replaced_0.22.5")
    old = api.run(name, "echo old")
    api.apply(name, "echo new")
    ours = api.ok("{p}/runs/get", {"id": old["id"]})
    assert differences(ours, recorded["response"]["json"]) == []
    assert ours["deleted"] is True
    assert api.output(ours) == "old\r\n"


def test_list_answers_like_the_recording(api: Api, name: str) -> None:
    recorded = recording("runs_list_0.22.5")["response"]["json"]
    api.run(name, "true")
    ours = api.ok("runs/list", {"project_name": "main", "limit": 2})
    tasks = [run for run in recorded if run["run_spec"]["configuration"]["type"] == "task"]
    for run in ours:
        if run["run_spec"]["configuration"]["type"] == "task":
            assert differences(run, tasks[0]) == []


def test_plan_answers_like_the_recording(api: Api) -> None:
    recorded = recording("get_plan_minimal_0.22.5_no_fleet")
    ours, theirs = api.ok("{p}/runs/get_plan", recorded["request"]["json"]), recorded["response"]["json"]
    assert differences(ours, theirs) == []
    assert ours["run_spec"] == theirs["run_spec"]
    key = ours["effective_run_spec"]["ssh_key_pub"]
    assert ours["effective_run_spec"] == {**theirs["effective_run_spec"], "ssh_key_pub": key}
    for field in ("current_resource", "action", "project_name"):
        assert ours[field] == theirs[field]
    assert ours["job_plans"][0]["job_spec"]["job_name"] == "dry-run-0-0"
    offer = recording("runs_get_running_ssh_fleet_0.22.5")["response"]["json"]["latest_job_submission"]
    assert differences(ours["job_plans"][0]["offers"][0], offer["job_runtime_data"]["offer"]) == []


def test_logs_answer_like_the_recording(api: Api, name: str) -> None:
    recorded = recording("logs_poll_e2e_0.22.5")["response"]["json"]
    run = api.run(name, "echo hello", "echo bye")
    body = {"run_name": name, "job_submission_id": run["latest_job_submission"]["id"]}
    ours = api.ok("{p}/logs/poll", body)
    assert differences(ours, recorded) == []
    assert ours["next_token"] is None
    assert ours["logs"][0]["log_source"] == "stdout"
    assert ours["logs"][0]["timestamp"].endswith("000Z")
    assert len(ours["logs"][0]["timestamp"]) == len(recorded["logs"][0]["timestamp"])


@pytest.mark.parametrize(
    ("case", "path"),
    [
        ("users_get_my_user", "users/get_my_user"),
        ("projects_list", "projects/list"),
        ("projects_get", "projects/main/get"),
        ("server_get_info", "server/get_info"),
        ("runs_delete", "{p}/runs/delete"),
        ("runs_stop_graceful", "{p}/runs/stop"),
        ("runs_stop_abort", "{p}/runs/stop"),
        ("repos_init_local", "{p}/repos/init"),
        ("repos_init_remote", "{p}/repos/init"),
        ("events_list", "events/list"),
    ],
)
def test_other_endpoints_answer_like_the_recording(api: Api, case: str, path: str) -> None:
    recorded = recording(f"{case}_0.22.5")
    reply = api.call(path, recorded["request"]["json"])
    assert reply.status_code == recorded["response"]["status"]
    assert differences(reply.json(), recorded["response"]["json"]) == []
    if recorded["response"]["json"] is None or case == "server_get_info":
        assert reply.json() == recorded["response"]["json"]


def test_repo_answers_like_the_recording(api: Api) -> None:
    made, asked = recording("repos_init_remote_0.22.5"), recording("repos_get_0.22.5")
    api.ok("{p}/repos/init", made["request"]["json"])
    assert api.ok("{p}/repos/get", asked["request"]["json"]) == asked["response"]["json"]


def test_metrics_answer_like_the_recording(api: Api, name: str) -> None:
    run = api.run(name, "true")
    url = f"{api.server.url}/api/project/main/metrics/job/{run['run_spec']['run_name']}"
    reply = api.session.get(url, timeout=10).json()
    assert differences(reply, recording("metrics_job_0.22.5")["response"]["json"]) == []


@pytest.mark.parametrize(
    "case",
    [
        "error_400_client_newer",
        "error_400_run_not_found",
        "error_401_no_auth",
        "error_403_bad_token",
        "error_404_project",
        "error_422",
    ],
)
def test_errors_are_equal_to_the_recording(api: Api, case: str) -> None:
    recorded = recording(f"{case}_0.22.5")
    request, response = recorded["request"], recorded["response"]
    headers = dict(request["headers"])
    if "Authorization" in headers:
        headers["Authorization"] = "Bearer bad" if "bad_token" in case else f"Bearer {api.server.token}"
    session = type(api.session)()
    reply = session.post(api.server.url + request["path"], json=request["json"], headers=headers, timeout=10)
    assert (reply.status_code, reply.json()) == (response["status"], response["json"])


def test_applying_again_is_equal_to_the_recording(api: Api, name: str) -> None:
    same, other = (
        recording(f"apply_{case}_0.22.5") for case in ("same_active_noforce", "different_active_force")
    )
    for recorded in (same, other):
        recorded["request"]["json"]["plan"]["run_spec"]["run_name"] = name
    first = api.ok("{p}/runs/apply", same["request"]["json"])
    for recorded in (same, other):
        reply = api.call("{p}/runs/apply", recorded["request"]["json"])
        assert (reply.status_code, reply.json()) == (400, recorded["response"]["json"])
    assert api.get(name)["id"] == first["id"]
    api.stop(name, abort=True)
    api.wait(name)


def test_deleting_an_active_run_is_equal_to_the_recording(api: Api) -> None:
    recorded = recording("delete_active_0.22.5")
    api.ok("{p}/runs/apply", {"plan": {"run_spec": task("re-24918", "sleep 100")}, "force": False})
    reply = api.call("{p}/runs/delete", recorded["request"]["json"])
    assert (reply.status_code, reply.json()) == (400, recorded["response"]["json"])
    api.stop("re-24918", abort=True)
    api.wait("re-24918")
