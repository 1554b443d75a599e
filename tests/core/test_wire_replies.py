"""Recorded replies of five server generations, read by our parsers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dstack_core import NoCapacityError, RunFailedError, RunStoppedError, errors
from dstack_core._wire.api import Api
from dstack_core._wire.http_messages import Reply
from dstack_core._wire.runs import outcome_of, parse_run
from dstack_core.models.statuses import RunStatus
from tests.core.scripted import DATA, recorded, recorded_reply, reply

API = Api("http://server", "main")
VERSIONS = ["0.18.44", "0.19.40", "0.20.24", "0.21.5", "0.22.5"]


@pytest.mark.parametrize("path", sorted(DATA.glob("runs_[ga][ep][tp]*.json")), ids=lambda path: path.stem)
def test_every_recorded_run_can_be_read(path: Any) -> None:
    body = json.loads(path.read_text())["response"]["json"]
    run = parse_run(body)
    assert (run.id, run.name, run.raw_status) == (body["id"], body["run_spec"]["run_name"], body["status"])
    assert [len(job.submissions) for job in run.jobs] == [len(job["job_submissions"]) for job in body["jobs"]]
    assert run.status in set(RunStatus)


@pytest.mark.parametrize(
    ("name", "status", "exit_status", "reason", "message"),
    [
        ("done_0.22.5", "done", 0, "all_jobs_done", "finished"),
        ("failed_0.22.5", "failed", 7, "container_exited_with_error", "failed: its command exited with status 7"),
        ("failed_e2e_0.18.44", "failed", None, "container_exited_with_error", "failed: its command exited with an error"),
        ("stopped_0.22.5", "terminated", None, "stopped_by_user", "was stopped on request"),
        ("aborted_0.22.5", "aborted", None, "aborted_by_user", "was aborted by a user"),
        ("max_duration_0.22.5", "failed", None, "max_duration_exceeded",
         "failed: its max_duration passed (Max duration exceeded)"),
        ("no_capacity_0.22.5", "failed", None, "failed_to_start_due_to_no_capacity",
         "failed: no capacity, no machine could be had (No offers matching the run requirements in fleet 'rig'. "
         "See https://dstack.ai/docs/guides/troubleshooting/#provisioning-fails)"),
        ("no_fleet_0.22.5", "failed", None, "failed_to_start_due_to_no_capacity",
         "failed: no capacity, no machine could be had (No matching fleet found. Possible reasons: "
         "https://dstack.ai/docs/guides/troubleshooting/#no-fleets)"),
    ],
)  # fmt: skip
def test_outcomes_have_a_message_in_words(
    name: str, status: str, exit_status: int | None, reason: str, message: str
) -> None:
    outcome = outcome_of(parse_run(recorded(f"runs_get_{name}")), "http://server/run")
    assert (outcome.status, outcome.exit_status, outcome.reason) == (status, exit_status, reason)
    assert outcome.message == message


def test_an_outcome_names_its_machine_and_its_duration() -> None:
    outcome = outcome_of(parse_run(recorded("runs_get_done_e2e_0.22.5")), "http://server/run")
    assert (outcome.instance, outcome.backend, outcome.region) == ("instance", "remote", "remote")
    assert (outcome.price_per_hour, outcome.cost) == (0.0, 0.0)
    assert outcome.duration == pytest.approx(6.721815)
    assert outcome.url == "http://server/run"
    wire = json.loads(json.dumps(outcome.to_dict()))
    assert wire["status"] == "done"
    assert type(outcome).from_dict(wire) == outcome


def test_outcomes_raise_the_matching_error() -> None:
    def outcome(name: str) -> Any:
        return outcome_of(parse_run(recorded(f"runs_get_{name}_0.22.5")), "http://server/run")

    assert outcome("done").raise_for_status().succeeded
    with pytest.raises(RunFailedError, match=r"exited with status 7\. See http://server/run") as caught:
        outcome("failed").raise_for_status()
    assert caught.value.outcome.exit_status == 7
    with pytest.raises(NoCapacityError, match="no capacity"):
        outcome("no_capacity").raise_for_status()
    with pytest.raises(NoCapacityError, match="time limit for retries"):
        outcome("retry_no_capacity").raise_for_status()
    for stopped in ("stopped", "aborted"):
        with pytest.raises(RunStoppedError):
            outcome(stopped).raise_for_status()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("error_401_no_auth", errors.AuthenticationError, "http://server refused the token"),
        ("error_403_bad_token", errors.AuthenticationError, "http://server refused the token"),
        ("error_403_non_member", errors.AccessDeniedError, "the project 'main'"),
        ("error_404_project", errors.ProjectNotFoundError, "no project 'main'"),
        ("error_400_client_newer", errors.RequestRejectedError, "incompatible with the server"),
    ],
)
def test_refusals_of_all_versions(version: str, name: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        API.get_run("x").parse(recorded_reply(f"{name}_{version}"))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_missing_run_is_parsed_as_absent(version: str) -> None:
    assert API.get_run("nope").parse(recorded_reply(f"error_400_run_not_found_{version}")) is None


@pytest.mark.parametrize("version", VERSIONS)
def test_log_pages_of_all_versions(version: str) -> None:
    log = API.poll_logs("run", "id", start_time=None).parse(recorded_reply(f"logs_poll_e2e_{version}"))
    assert [chunk.endswith(b"\r\n") for chunk in log.messages.chunks] == [True, True]
    assert log.messages.chunks[1] == b"bye\r\n"
    assert log.messages.timestamps[0].endswith("+00:00")
    assert (log.next_token, log.tokens) == (None, version != "0.18.44")


@pytest.mark.parametrize("version", VERSIONS)
def test_users_of_all_versions(version: str) -> None:
    user = API.get_user_key().parse(recorded_reply(f"users_get_my_user_{version}"))
    assert user.name == "admin"
    assert (user.public_key is None) == (version == "0.18.44")


def test_a_plan_without_offers() -> None:
    plan = API.get_plan({}).parse(recorded_reply("get_plan_minimal_0.22.5_no_fleet"))
    assert (plan.offers, plan.total_offers, plan.max_price_per_hour, plan.hints) == ((), 0, None, ())


EXACT = {
    "gpu": {"memory": {"min": 16.0, "max": 16.0}},
    "memory": {"min": 8.0, "max": None},
    "disk": {"size": {"min": 1.5, "max": 1.5}},
}
HINTS = (
    "disk: 1.5GB is an exact size; write 1.5GB.. for at least that.",
    "gpu memory: 16GB is an exact size; write 16GB.. for at least that.",
)


def test_exact_sizes_are_named_when_there_are_no_offers() -> None:
    body = recorded("get_plan_minimal_0.22.5_no_fleet")
    body["job_plans"][0]["job_spec"]["requirements"]["resources"] |= EXACT
    plan = API.get_plan({}).parse(reply(body))
    assert (plan.hints, plan.waits_for_capacity) == (HINTS, False)
    for event, waits in (("no-capacity", True), ("error", False)):
        body["job_plans"][0]["job_spec"]["retry"] = {"on_events": [event], "duration": 60}
        assert API.get_plan({}).parse(reply(body)).waits_for_capacity is waits
    offer = recorded("runs_get_running_ssh_fleet_0.22.5")["latest_job_submission"]["job_runtime_data"][
        "offer"
    ]
    body["job_plans"][0]["offers"] = [offer]
    assert API.get_plan({}).parse(reply(body)).hints == ()


def test_exact_sizes_are_named_when_there_was_no_capacity() -> None:
    body = recorded("runs_get_no_capacity_0.22.5")
    body["jobs"][0]["job_spec"]["requirements"]["resources"] |= EXACT
    message = outcome_of(parse_run(body), "url").message
    assert message.endswith(f"provisioning-fails). {HINTS[0]} {HINTS[1][:-1]}")
    body["jobs"][0]["job_submissions"][-1]["termination_reason_message"] = "No offers."
    assert "(No offers). disk: " in outcome_of(parse_run(body), "url").message
    submission = body["jobs"][0]["job_submissions"][-1]
    submission["termination_reason_message"] = f"No offers. {HINTS[0]}"
    assert outcome_of(parse_run(body), "url").message.count("exact size") == 2, "each hint appears once"
    body["jobs"][0]["job_submissions"][-1]["termination_reason"] = "executor_error"
    assert HINTS[1] not in outcome_of(parse_run(body), "url").message


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (Reply(200, {}, b"<html>hello</html>"), errors.ProtocolError, "Is this the address of a dstack server"),
        (reply({"hello": "world"}), errors.ProtocolError, "sent an unexpected reply to"),
        (Reply(404, {}, b"<html>nginx</html>"), errors.ProtocolError, "Is this the address"),
        (Reply(405, {}, b"<html>nginx</html>"), errors.ProtocolError, "Is this the address"),
        (Reply(403, {}, b"<html>blocked by a proxy; no token</html>"), errors.ProtocolError, "answered 403"),
        (Reply(302, {"location": "https://server/login"}, b""), errors.ProtocolError, "redirects to https://server/login"),
        (Reply(500, {}, b"Internal Server Error"), errors.TransientServerError, "answered 500: Internal Server Error"),
        (Reply(503, {"retry-after": "3"}, b""), errors.TransientServerError, "answered 503"),
        (reply({"detail": "Method Not Allowed"}, 405), errors.UnsupportedServerError, "0.18.44 or newer"),
    ],
)  # fmt: skip
def test_unsuccessful_replies_raise_the_matching_error(
    answer: Reply, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        API.get_run("x").parse(answer)


def test_unknown_words_of_a_newer_server_are_kept() -> None:
    body = recorded("runs_get_done_0.22.5") | {
        "status": "failed",
        "termination_reason": "eaten_by_bears",
        "novelty": 1,
    }
    body["jobs"][0]["job_submissions"][-1]["termination_reason"] = None
    outcome = outcome_of(parse_run(body), "u")
    assert (outcome.reason, outcome.message) == ("eaten_by_bears", "ended: eaten_by_bears")
    assert RunStatus("hibernating") == "hibernating"
    assert not RunStatus("hibernating").is_finished


def test_a_run_url_leads_to_the_page_of_the_run() -> None:
    assert (
        Api("https://dstack.example", "ml team").run_url("id-1")
        == "https://dstack.example/projects/ml%20team/runs/id-1"
    )
