"""The execution of commands: output, environment, exit statuses, stops, retries, several nodes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.local.support import Api, alive, ending, wait_until


def test_a_run_passes_every_status(api: Api, name: str) -> None:
    run = api.run(name, "true")
    events = api.ok("events/list", {"within_runs": [run["id"]], "ascending": True})
    assert [event["message"].replace(" status changed", "").partition(".")[0] for event in events] == [
        "Job SUBMITTED -> PROVISIONING",
        "Run SUBMITTED -> PROVISIONING",
        "Job PROVISIONING -> PULLING",
        "Job PULLING -> RUNNING",
        "Run PROVISIONING -> RUNNING",
        "Job RUNNING -> TERMINATING",
        "Job TERMINATING -> DONE",
        "Run RUNNING -> TERMINATING",
        "Run TERMINATING -> DONE",
    ]


def test_pulling_shows_in_the_status_message(make: Callable[..., Api]) -> None:
    api = make(step_seconds=0.5)
    api.apply("pulls", "true")

    def pulling() -> Any:
        run = api.get("pulls")
        return run if run["latest_job_submission"]["status"] == "pulling" else None

    run = wait_until(pulling)
    assert (run["status"], run["status_message"]) == ("provisioning", "pulling")


@pytest.mark.parametrize(
    ("command", "status"), [("exit 7", 7), ("no-such-command", 127), ("kill -9 $$", -1), ("exit 255", 255)]
)
def test_exit_status_is_reported(api: Api, name: str, command: str, status: int) -> None:
    run = api.run(name, "echo before", command, "echo never")
    assert ending(run) == ("failed", "job_failed", "failed", "container_exited_with_error", status)
    assert run["latest_job_submission"]["status_message"] == f"exited ({status})"
    assert "before\r\n" in api.output(run)
    assert "never" not in api.output(run)


def test_output_is_clean_and_complete(api: Api, name: str) -> None:
    run = api.run(
        name, "echo 'grüße, 世界 🚀'", "printf '\\033[31mred\\033[0m\\n'", "echo err >&2", "test -t 1"
    )
    assert api.output(run) == "grüße, 世界 🚀\r\nred\r\nerr\r\n"
    assert run["status"] == "done"


def test_thousands_of_lines_keep_their_order(api: Api, name: str) -> None:
    run = api.run(name, "for i in $(seq 5000); do echo line $i; done")
    assert api.output(run).split("\r\n") == [*(f"line {number}" for number in range(1, 5001)), ""]


def test_a_failing_command_prints_nothing_of_the_shell(api: Api, name: str) -> None:
    assert api.output(api.run(name, "exit 7")) == ""


def test_environment_holds_the_task_and_nothing_of_the_server(
    monkeypatch: pytest.MonkeyPatch, api: Api, name: str
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_SERVER", "do not tell")
    run = api.run(name, "env", env=["FOO=bar=baz", "N=1"])
    lines = api.output(run).replace("\r\n", "\n").splitlines()
    env = dict(line.split("=", 1) for line in lines if "=" in line)
    assert (env["FOO"], env["N"]) == ("bar=baz", "1")
    assert (env["DSTACK_RUN_NAME"], env["DSTACK_RUN_ID"]) == (name, run["id"])
    assert env["DSTACK_JOB_ID"] == run["latest_job_submission"]["id"]
    assert (env["DSTACK_NODE_RANK"], env["DSTACK_NODES_NUM"], env["DSTACK_GPUS_NUM"]) == ("0", "1", "0")
    assert env["HOME"].startswith(str(api.server.directory))
    allowed = {"PATH", "HOME", "LANG", "TERM", "PWD", "SHLVL", "_", "OLDPWD", "FOO", "N"}
    assert {key for key in env if not key.startswith("DSTACK_")} <= allowed
    assert api.server.token not in "\n".join(lines)


def test_working_directory_is_an_empty_one_of_its_own(api: Api, name: str) -> None:
    run = api.run(name, "ls -A", "pwd", "[ $PWD = $DSTACK_WORKING_DIR ]")
    assert ending(run)[4] == 0
    assert api.output(run).strip() == run["latest_job_submission"]["job_runtime_data"]["working_dir"]
    sub = api.run(f"{name}-sub", "pwd", working_dir="/workflow/a/b")
    assert api.output(sub).strip().endswith("/workflow/a/b")


def test_background_command_may_be_followed_by_others(api: Api, name: str) -> None:
    run = api.run(name, "sleep 300 &", "echo next")
    assert (run["status"], api.output(run)) == ("done", "next\r\n")


def test_processes_left_behind_are_killed_with_their_job(api: Api, name: str) -> None:
    leaver = (
        "setsid sleep 300 & echo pid $!; env -i sleep 300 & echo pid $!; bash -i -c 'sleep 300 & echo pid $!'"
    )
    run = api.run(name, leaver)
    pids = [int(line.split()[1]) for line in api.output(run).splitlines() if line.startswith("pid")]
    assert len(pids) == 3
    assert run["status"] == "done"
    assert [pid for pid in pids if alive(pid)] == []


def test_a_process_that_closes_its_files_is_not_hung_up(api: Api, name: str) -> None:
    run = api.run(name, "echo before; exec <&- >&- 2>&-; sleep 0.2; exit 3")
    assert ending(run)[-1] == 3
    assert api.output(run).split() == ["before"]


def test_stop_lets_a_task_end_by_itself(api: Api, name: str) -> None:
    api.apply(
        name, "echo ready; trap 'echo got it; sleep 0.1; echo bye; exit 0' INT; while :; do sleep 0.05; done"
    )
    api.wait_output(name, "ready")
    api.stop(name)
    stopping = api.get(name)
    assert (stopping["status"], stopping["termination_reason"]) == ("terminating", "stopped_by_user")
    run = api.wait(name)
    assert ending(run) == ("terminated", "stopped_by_user", "terminated", "terminated_by_user", None)
    assert run["latest_job_submission"]["status_message"] == "stopped"
    assert api.output(run).endswith("got it\r\nbye\r\n")


def test_stop_reaches_the_foreground_command(make: Callable[..., Api]) -> None:
    api = make(stop_grace_seconds=600)
    api.apply("sleeper", "echo ready", "sleep 300")
    api.wait_output("sleeper", "ready")
    api.stop("sleeper")
    assert api.wait("sleeper")["status"] == "terminated"


def test_stop_kills_a_task_that_ignores_it(api: Api, name: str) -> None:
    api.apply(name, "trap '' INT; echo pid $$; sleep 300")
    pid = int(api.output(api.wait_output(name, "pid")).split()[1])
    start = time.monotonic()
    api.stop(name)
    run = api.wait(name)
    assert time.monotonic() - start >= 0.5
    assert ending(run) == ("terminated", "stopped_by_user", "terminated", "terminated_by_user", None)
    assert not alive(pid)


def test_abort_kills_at_once(api: Api, name: str) -> None:
    api.apply(name, "trap 'echo no' INT; echo ready; sleep 300")
    api.wait_output(name, "ready")
    api.stop(name, abort=True)
    run = api.wait(name)
    assert ending(run) == ("terminated", "aborted_by_user", "aborted", "aborted_by_user", None)
    assert api.output(run) == "ready\r\n"


def test_abort_overtakes_a_stop(make: Callable[..., Api]) -> None:
    api = make(stop_grace_seconds=60)
    api.apply("both", "trap '' INT; echo ready; sleep 300")
    api.wait_output("both", "ready")
    api.stop("both")
    api.stop("both", abort=True)
    assert ending(api.wait("both"))[:3] == ("terminated", "aborted_by_user", "aborted")


@pytest.mark.parametrize("abort", [False, True])
def test_stop_before_the_start(make: Callable[..., Api], abort: bool) -> None:
    api = make(step_seconds=0.4)
    run = api.apply("early", "echo never")
    api.stop("early", abort)
    run = api.wait("early")
    assert run["status"] == "terminated"
    assert run["latest_job_submission"]["job_runtime_data"] is None
    assert api.output(run) == ""


def test_stop_ignores_unknown_and_finished_runs(api: Api, name: str) -> None:
    before = api.run(name, "true")
    api.ok("{p}/runs/stop", {"runs_names": [name, "never-was"], "abort": True})
    assert api.get(name) == before


@pytest.mark.parametrize(
    ("text", "stored", "seconds"), [("1h", 3600, 3600), (90, 90, 90), ("off", "off", None)]
)
def test_max_duration_is_normalised(api: Api, name: str, text: Any, stored: Any, seconds: int | None) -> None:
    run = api.apply(name, "true", max_duration=text)
    assert run["run_spec"]["configuration"]["max_duration"] == stored
    assert run["jobs"][0]["job_spec"]["max_duration"] == seconds
    assert api.wait(name)["status"] == "done"


def test_max_duration_ends_a_task(api: Api, name: str) -> None:
    api.apply(name, "echo start", "sleep 300", max_duration="1s")
    run = api.wait(name)
    assert ending(run) == ("failed", "job_failed", "terminated", "max_duration_exceeded", None)
    assert run["latest_job_submission"]["error"] == "max duration exceeded"


def test_max_duration_of_the_profile_counts(api: Api, name: str) -> None:
    api.apply(name, "sleep 300", spec={"profile": {"name": "p", "max_duration": 1}})
    assert ending(api.wait(name))[3] == "max_duration_exceeded"


def test_retry_submits_the_job_again(api: Api, name: str) -> None:
    # The marker outlives the first attempt, whose directory is removed.
    marker = f"{api.server.directory}/{name}"
    run = api.run(
        name, f"[ -e {marker} ] && echo second || {{ touch {marker}; echo first; exit 3; }}", retry=True
    )
    assert run["status"] == "done"
    attempts = run["jobs"][0]["job_submissions"]
    assert [(one["submission_num"], one["exit_status"]) for one in attempts] == [(0, 3), (1, 0)]
    assert [api.output(run, 0, number) for number in (0, 1)] == ["first\r\n", "second\r\n"]
    assert run["latest_job_submission"]["id"] == attempts[1]["id"]


def test_retry_shows_in_the_status(make: Callable[..., Api]) -> None:
    api = make(retry_seconds=600)
    api.apply("again", "exit 3", retry={"on_events": ["error"], "duration": "1h"})
    run = api.wait("again", "pending")
    assert run["status_message"] == "retrying"
    assert run["latest_job_submission"]["status"] == "failed"
    api.stop("again")
    assert ending(api.wait("again"))[:2] == ("terminated", "stopped_by_user")


def test_errors_are_not_retried_for_other_events(api: Api, name: str) -> None:
    run = api.run(name, "exit 3", retry={"on_events": ["no-capacity"], "duration": "1h"})
    assert ending(run)[:2] == ("failed", "job_failed")
    assert len(run["jobs"][0]["job_submissions"]) == 1


def test_cost_is_price_times_duration(make: Callable[..., Api]) -> None:
    api = make(price=3600.0)
    run = api.run("costly", "sleep 0.2")
    assert 0.2 < run["cost"] < 60
    assert run["cost"] == round(run["cost"], 4)


def test_nodes_run_side_by_side_with_their_own_logs(api: Api, name: str) -> None:
    run = api.run(name, "echo rank $DSTACK_NODE_RANK of $DSTACK_NODES_NUM at $DSTACK_MASTER_NODE_IP", nodes=3)
    assert run["status"] == "done"
    assert [job["job_spec"]["job_num"] for job in run["jobs"]] == [0, 1, 2]
    assert [job["job_spec"]["job_name"] for job in run["jobs"]] == [f"{name}-{rank}-0" for rank in range(3)]
    assert [api.output(run, rank) for rank in range(3)] == [
        f"rank {rank} of 3 at 127.0.0.1\r\n" for rank in range(3)
    ]


def test_a_failing_node_ends_the_others(api: Api, name: str) -> None:
    run = api.run(name, "[ $DSTACK_NODE_RANK = 1 ] && exit 5", "sleep 300 || true; sleep 300", nodes=2)
    assert (run["status"], run["termination_reason"]) == ("failed", "job_failed")
    reasons = {job["job_submissions"][0]["termination_reason"] for job in run["jobs"]}
    assert "container_exited_with_error" in reasons


def test_service_and_dev_environment_run_until_stopped(api: Api, name: str) -> None:
    configurations = [
        {"type": "service", "commands": ["echo up", "sleep 300"], "port": 8000},
        {"type": "dev-environment", "ide": "vscode", "init": ["echo up"]},
    ]
    for number, configuration in enumerate(configurations):
        spec = {"run_name": f"{name}-{number}", "configuration": configuration}
        run = api.ok("{p}/runs/apply", {"plan": {"run_spec": spec}, "force": False})
        assert (run["service"] is not None) == (number == 0)
        api.wait_output(f"{name}-{number}", "up")
        api.stop(f"{name}-{number}")
        assert api.wait(f"{name}-{number}")["status"] == "terminated"


def test_entrypoint_gets_the_commands_as_arguments(api: Api, name: str) -> None:
    run = api.run(name, "one", "two", image="any", entrypoint="printf '%s,'")
    assert api.output(run) == "one,two,"
    assert api.run(f"{name}-bad", "x", image="any", entrypoint="/no/such/file")["status"] == "failed"
