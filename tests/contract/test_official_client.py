"""dstack's own client against the embedded server: every command has an answer, attaching shows the live log."""

from __future__ import annotations

import select
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from dstack_core.local import LocalServer
from tests.contract.official_client import OfficialClient
from tests.docs.blocks import blocks
from tests.local.support import Api, recording, wait_until
from tests.ports import free_port
from tests.rig.server_process import DEFAULT_VERSION

# `real` because it needs the environment of a real server; the embedded one speaks like 0.22.5.
pytestmark = [
    pytest.mark.real,
    # A test starts up to ten commands, and each loads all of dstack, which takes seconds on a busy machine.
    pytest.mark.timeout(900),
    pytest.mark.skipif(DEFAULT_VERSION != "0.22.5", reason="the embedded server speaks like 0.22.5"),
]


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with LocalServer() as server:
        yield server


@pytest.fixture
def api(server: LocalServer) -> Api:
    return Api(server)


@pytest.fixture
def official(server: LocalServer) -> Iterator[OfficialClient]:
    # OpenSSH's control socket is below the home directory, and its path may have at most 108 characters.
    with tempfile.TemporaryDirectory(prefix="d-") as home:
        yield OfficialClient(server, Path(home))


def test_a_run_is_applied_attached_and_ends_with_its_status(official: OfficialClient) -> None:
    done = official.configuration("hello", "type: task\ncommands: [echo hello, sleep 3, echo bye]\n")
    reply = official.run("apply", "-f", done, "-y")
    assert "ssh (local)" in reply.text, "the offer, whose backend dstack's client knows"
    assert reply.text.splitlines()[-3:] == ["hello", "bye", "Exited (0)"]
    assert reply.status == 0

    attached = official.run("attach", "hello", "--logs")
    assert attached.text.splitlines()[-3:] == ["hello", "bye", "Exited (0)"], "a finished run has its log"
    assert attached.status == 0

    failing = official.configuration("failing", "type: task\ncommands: [echo no, sleep 3, exit 3]\n")
    reply = official.run("apply", "-f", failing, "-y")
    assert "no\nExited (3)" in reply.text
    assert reply.status == 1


def test_a_run_is_submitted_detached_listed_read_updated_stopped_and_deleted(
    official: OfficialClient, api: Api
) -> None:
    endless = official.configuration("endless", "type: task\ncommands: [echo started, sleep 600]\n")
    assert "submitted, detaching" in official.run("apply", "-f", endless, "-y", "-d").text
    api.wait_output("endless", "started")
    assert "running" in official.run("ps").text
    assert "started" in official.run("logs", "endless").text
    # The server measures by itself: there may be no data yet, which that command shows without the run's name.
    metrics = official.run("metrics", "endless")
    assert (metrics.status, "UTILIZATION" in metrics.text, "cpu" in metrics.text) == (0, True, True)
    again = official.run("apply", "-f", endless, "-y", "-d")
    assert "Detected no changes" in again.text
    before = api.get("endless")
    official.configuration("endless", "type: task\ncommands: [echo started, sleep 600]\npriority: 7\n")
    updated = official.run("apply", "-f", endless, "-y", "-d")
    assert updated.status == 0, updated.text
    after = api.get("endless")
    assert (after["id"], after["status"]) == (before["id"], "running")
    assert after["run_spec"]["configuration"]["priority"] == 7
    assert "Stopped" in official.run("stop", "endless", "-y").text
    assert "stopped" in official.run("ps", "-a").text
    assert "Run status changed" in official.run("event").text
    deleted = official.run("delete", "-f", endless, "-y")
    assert (deleted.status, "Run endless deleted" in deleted.text) == (0, True)
    assert api.call("{p}/runs/get", {"run_name": "endless"}).status_code == 400


def test_the_metrics_of_a_run_are_shown_while_it_runs() -> None:
    with (
        LocalServer(metrics_seconds=0.2, gpu_usage=(31, 11)) as server,
        tempfile.TemporaryDirectory(prefix="d-") as home,
    ):
        api, official = Api(server), OfficialClient(server, Path(home))
        api.apply("busy", "sleep 600", resources={"gpu": {"name": ["A100"], "count": 1}})
        url = f"{server.url}/api/project/{server.project}/metrics/job/busy"
        wait_until(lambda: api.session.get(url, timeout=30).json()["metrics"])
        reply = official.run("metrics", "busy")
        assert reply.status == 0, reply.text
        assert " 31%" in reply.text, reply.text
        assert "11GB/80GB" in reply.text, reply.text
        api.stop("busy", abort=True)


def test_attaching_forwards_the_ports_of_a_run(official: OfficialClient, api: Api) -> None:
    port, local = free_port(), free_port()
    serve = f"python3 -m http.server {port} --bind 127.0.0.1"
    text = f"type: task\nports: ['{local}:{port}']\ncommands: ['echo ok > index.html', '{serve}']\n"
    assert official.run("apply", "-f", official.configuration("web", text), "-y", "-d").status == 0
    api.wait(name := "web", "running")
    attached = official.start("attach", name)
    try:

        def page() -> str:
            try:
                return requests.get(f"http://localhost:{local}", timeout=5).text
            except requests.RequestException:
                assert attached.poll() is None, attached.communicate()
                return ""

        assert wait_until(page, 120) == "ok\n"
        # The ports open a moment before the client shows them.
        assert attached.stdout is not None
        select.select([attached.stdout], [], [], 60)
        attached.send_signal(signal.SIGINT)
        shown, _ = attached.communicate(timeout=60)
        assert f"localhost:{local} -> {port}" in shown
        assert "Traceback" not in shown
    finally:
        attached.kill()
    api.stop(name, abort=True)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("offer", "ssh (local)"),
        ("offer --json --gpu A100:80GB:2", '"total_offers":1'),
        ("offer --gpu 16GB", "No matching"),
        ("offer --group-by gpu,backend,count", "A100:80GB:8"),
        ("event", ""),
        ("fleet", "NODES"),
        ("volume", "STATUS"),
        ("secret list", "VALUE"),
        ("gateway list", "HOSTNAME"),
        ("project list", "main"),
        ("export list", "IMPORTERS"),
        ("import list", "FLEETS"),
        ("fleet get nope --json", "not found"),
        ("volume get nope --json", "not found"),
        ("secret get nope", "not found"),
        ("secret set a b", "OK"),
        ("apply -y -f volume.dstack.yml", "active"),
        ("apply -y -f gateway.dstack.yml", "not emulated by the embedded server"),
    ],
)
def test_every_other_command_has_an_answer(official: OfficialClient, command: str, expected: str) -> None:
    official.configuration("fleet", "type: fleet\nnodes: 1\n")
    official.configuration("volume", "type: volume\nbackend: aws\nregion: x\nsize: 10GB\n")
    official.configuration(
        "gateway", "type: gateway\nname: gate\nbackend: aws\nregion: x\ndomain: example.com\n"
    )
    reply = official.run(*command.split())
    assert expected in reply.text
    assert reply.status == int("not " in expected)


def test_a_fleet_is_applied_listed_used_and_deleted() -> None:
    with (
        LocalServer(instance_seconds=0.05, regions={"aws/us-east-1": 1.5, "aws/us-west-2": 0.5}) as server,
        tempfile.TemporaryDirectory(prefix="d-") as home,
    ):
        api, official = Api(server), OfficialClient(server, Path(home))
        warm = official.configuration("warm", "type: fleet\nnodes: 1..2\nregions: [us-east-1]\n")
        reply = official.run("apply", "-y", "-f", warm)
        assert reply.status == 0, reply.text
        assert "$1.5" in reply.text, reply.text
        listed = official.run("fleet").text
        assert "us-east-1" in listed, listed
        assert "idle" in listed, listed
        assert '"name":"warm"' in official.run("fleet", "get", "warm", "--json").text.replace(" ", "")
        official.configuration("warm", "type: fleet\nnodes: 1..3\nregions: [us-east-1]\n")
        updated = official.run("apply", "-y", "-f", warm)
        assert updated.status == 0, updated.text
        fleet = api.ok("{p}/fleets/get", {"name": "warm"})
        assert fleet["spec"]["configuration"]["nodes"] == {"min": 1, "max": 3}
        train = official.configuration(
            "train", "type: task\nfleets: [warm]\ncommands: [echo hello, sleep 1]\n"
        )
        done = official.run("apply", "-y", "-f", train)
        assert (done.status, "hello" in done.text) == (0, True), done.text
        deleted = official.run("fleet", "delete", "-y", "warm")
        assert deleted.status == 0, deleted.text
        assert "warm" not in official.run("fleet").text


def test_the_python_api_submits_attaches_reads_and_stops(
    official: OfficialClient, server: LocalServer
) -> None:
    reply = official.python(
        f"""
from dstack.api import Client, GPU, Resources, Task
client = Client.from_config(project_name="main", server_url="{server.url}", user_token="{server.token}")
task = Task(name="hello", commands=["echo hello", "sleep 3", "echo bye"], resources=Resources(gpu=GPU(memory="24GB..")))
plan = client.runs.get_run_plan(task)
print(plan.action.value, len(plan.job_plans[0].offers))
run = client.runs.apply_plan(plan)
run.attach()
print(b"".join(run.logs()))
run.detach()
while not run.status.is_finished():
    run.refresh()
print(run.status.value, run.backend.value, run.hostname)
other = client.runs.apply_configuration(Task(name="other", commands=["sleep 600"]))
other.stop()
print(sorted(one.name for one in client.runs.list(all=True)), [one.name for one in client.backends.list()])
"""
    )
    assert reply.status == 0, reply.text
    lines = reply.text.splitlines()
    assert lines[0] == "create 1"
    assert lines[1] in (r"b'hello\r\nbye\r\n'", r"b'hello\nbye\n'")
    assert lines[2] == "done remote 127.0.0.1"
    assert lines[3] == "['hello', 'other'] []"


def test_the_documented_commands_work(official: OfficialClient, server: LocalServer) -> None:
    official.configuration("train", "type: task\ncommands: [echo training]\n")
    lines = [line for block in blocks("shell dstack") for line in block.code.splitlines()]
    assert len(lines) > 4
    for line in lines:
        words = line.replace("http://127.0.0.1:3000", server.url).replace("TOKEN", server.token).split()
        assert words[0] == "dstack"
        reply = official.run(*words[1:])
        assert reply.status == 0, (line, reply.text)
    assert "Run status changed" in reply.text


def test_every_path_of_the_real_server_is_answered(api: Api) -> None:
    paths: dict[str, Any] = recording("openapi_0.22.5")["paths"]
    posts = [path for path, methods in paths.items() if "post" in methods and path.startswith("/api/")]
    assert len(posts) > 70
    for path in posts:
        named = path.format(project_name="main", backend_name="aws", run_name="x")
        reply = api.session.post(api.server.url + named, json={}, timeout=10)
        assert reply.status_code in (200, 400, 422), (path, reply.status_code)
