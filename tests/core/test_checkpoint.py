"""``survive.checkpoint``: every attempt of a run, and every try of a task, has one ``$DSTACK_CHECKPOINT``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core import Client, ConfigurationError, Survive
from dstack_core._wire.checkpoints import check_checkpoint
from dstack_core.local import LocalServer, VirtualTime

# Each attempt continues at the step after the last one that is stored.
WORK = """
mkdir -p "$DSTACK_CHECKPOINT"
step=$(cat "$DSTACK_CHECKPOINT/step" 2>/dev/null || echo 0)
echo "continues at $step"
while [ $step -lt 3 ]; do step=$((step + 1)); echo $step > "$DSTACK_CHECKPOINT/step"; sleep 60; done
"""
VOLUME = {"type": "volume", "name": "data", "backend": "aws", "region": "us-east-1", "size": "10GB"}
TRY = "airflow:etl/manual__1/fit[3]/{}#5f1c9a"


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with VirtualTime(), LocalServer() as server:
        yield server


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with server.client() as client:
        client.volumes.apply(VOLUME)
        client.volumes.wait("data", timeout=60)
        yield client


def task(command: str = "true", **keys: Any) -> dstack.Task:
    return dstack.Task(commands=[command], name="train", volumes=["data:/mnt/data"], **keys)


def submit(client: Client, command: str = "true", *args: Any, **options: Any) -> dstack.Run:
    given = {"spot_policy": "spot", "survive": {"checkpoint": "/mnt/data/checkpoints"}, **options}
    return client.runs.submit(task(command), *args, **given)


def directory(server: LocalServer) -> str:
    return str(server.runs[-1].configuration["env"]["DSTACK_CHECKPOINT"])


@pytest.mark.parametrize("path", ["/mnt/data", "/workflow/data"])
def test_an_attempt_continues_from_the_file_of_the_attempt_before(
    server: LocalServer, client: Client, path: str
) -> None:
    server.scenarios.interrupt_after(10)
    configuration = dstack.Task(commands=[WORK], name="train", volumes=[f"data:{path}"])
    survive = Survive(checkpoint=f"{path}/checkpoints/")
    run = client.runs.submit(configuration, spot_policy="spot", survive=survive)
    outcome = run.wait(poll_interval=5)
    assert [one.reason for one in outcome.attempts] == ["interrupted_by_no_capacity", "done_by_runner"]
    assert server.runs[0].log == ("continues at 0", "continues at 1")
    assert directory(server) == f"{path}/checkpoints/train"
    # Another run that shares the volume has its own, and one of the same name continues.
    other, again = (
        client.runs.submit(configuration, name, spot_policy="spot", survive=survive)
        for name in ("other", "train")
    )
    assert other.wait(poll_interval=5).succeeded
    assert again.wait(poll_interval=5).succeeded
    logs = [b"".join(each.logs()).decode().strip() for each in (other, again)]
    assert logs == ["continues at 0", "continues at 3"]


def test_the_async_client_gives_it_too(server: LocalServer, client: Client) -> None:
    async def submitted() -> None:
        target: dict[str, Any] = {
            "server_url": server.url,
            "project_name": server.project,
            "user_token": server.token,
        }
        async with dstack.AsyncClient(**target) as other:
            await other.runs.submit(task(), survive={"checkpoint": "/mnt/data"})

    asyncio.run(submitted())
    assert directory(server) == "/mnt/data/train"


def test_all_tries_of_a_task_have_one_directory(server: LocalServer, client: Client) -> None:
    found = []
    for number, marker in enumerate(
        (
            TRY.format("1of2"),
            TRY.format("2of2"),
            # Cleared, and submitted as one that only its owner stops.
            TRY.format("3of4") + "/keep",
            # The DAG run was deleted and created again.
            TRY.format("1of2").replace("5f1c9a", "5f1c9b"),
            TRY.format("1of2").replace("[3]", "[4]"),
            "prefect:flow_run/0c1d/stop/3b0f92-0/1",
            "prefect:flow_run/0c1d/stop/3b0f92-0/2",
            "prefect:flow_run/0c1d/stop/3b0f92-1/1",
            # Not the marker of a try.
            "nightly",
        )
    ):
        submit(client, "true", f"train-{number}", marker=marker)
        found.append(directory(server).removeprefix("/mnt/data/checkpoints/"))
    assert found[0] == found[1] == found[2]
    assert found[5] == found[6]
    assert len(set(found)) == 6
    assert found[0].startswith("etl-manual__1-fit-3-")
    assert found[5].startswith("flow_run-0c1d-stop-3b0f92-0-")
    assert found[-1] == "train-8"


@pytest.mark.parametrize(
    ("volumes", "kept"),
    [
        (["/nfs/data:/mnt/data"], True),
        ([{"name": ["one", "two"], "path": "/mnt/data/"}], True),
        (["cache:/cache", "data-${{ dstack.node_rank }}:/mnt"], True),
        ([{"instance_path": "/nfs", "path": "/mnt/data", "optional": True}], False),
        (["data:/mnt/dat"], False),
    ],
)
def test_what_counts_as_a_volume(volumes: list[Any], kept: bool) -> None:
    configuration = dstack.Task(commands=["true"], volumes=volumes)
    refused = pytest.raises(ConfigurationError, match=r"^survive\.checkpoint: expected a path in ")
    with nullcontext() if kept else refused:
        check_checkpoint(configuration, "/mnt/data")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"survive": {"checkpoint": "/tmp/x"}},
            "survive.checkpoint: expected a path in one of the configuration's volumes (/mnt/data), got "
            "'/tmp/x'. Anything else is lost with the machine: use one of these paths, or mount a volume at "
            "/tmp.",
        ),
        (
            {"env": {"DSTACK_CHECKPOINT": "/mnt/data/own"}},
            "survive.checkpoint: expected no DSTACK_CHECKPOINT in env with it, got both. Leave one of them out.",
        ),
        (
            {"survive": {"checkpoint": "checkpoints"}},
            "survive.checkpoint: expected an absolute path without .., such as /data/checkpoints, got "
            "'checkpoints'",
        ),
        (
            {"survive": {"checkpoint": "/mnt/data/../x"}},
            "survive.checkpoint: expected an absolute path without .., such as /data/checkpoints, got "
            "'/mnt/data/../x'",
        ),
        (
            {"survive": {"checkpoint": 3}},
            "survive.checkpoint: expected an absolute path without .., such as /data/checkpoints, got 3",
        ),
    ],
)
def test_a_wrong_checkpoint_is_one_error_before_anything_is_submitted(
    client: Client, server: LocalServer, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        submit(client, **options)
    assert caught.value.message.startswith(text)
    assert server.runs == []


def test_without_volumes_the_error_shows_how_to_mount_one(client: Client, server: LocalServer) -> None:
    with pytest.raises(ConfigurationError) as caught:
        client.runs.submit(dstack.Task(commands=["true"]), survive={"checkpoint": "/data/checkpoints"})
    assert caught.value.message == (
        "survive.checkpoint: expected a path in a mounted volume, got '/data/checkpoints'. Anything else is "
        'lost with the machine: mount one, such as volumes: ["my-volume:/data"].'
    )
    assert server.runs == []


def test_without_it_the_variable_is_the_users(client: Client, server: LocalServer) -> None:
    submit(client, survive="4h", env={"DSTACK_CHECKPOINT": "/anywhere"}).wait(poll_interval=5)
    assert directory(server) == "/anywhere"
    submit(client, survive=True).wait(poll_interval=5)
    assert "DSTACK_CHECKPOINT" not in server.runs[-1].configuration["env"]
