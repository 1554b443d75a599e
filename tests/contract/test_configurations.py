"""A configuration file beside the code: how a server reads what we fill in."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import dstack_core as dstack
from tests.contract.conftest import Target
from tests.dstack_files import ENV, FILES


def echoed(target: Target, run: dstack.Run) -> dict[str, Any]:
    """Return the run as the server reports it."""
    with target.client() as client:
        reply = client._transport(client._operations.api.get_run(run.name).request)
    shown: dict[str, Any] = json.loads(reply.body)
    return shown


def lines_of(target: Target, run: dstack.Run) -> list[str]:
    outcome = run.wait(target.timeout, poll_interval=target.poll_interval)
    assert outcome.succeeded, outcome.message
    return b"".join(run.logs()).decode().replace("\r", "").splitlines()


def test_what_a_configuration_leaves_open_reaches_the_run(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".dstack").mkdir()
    (tmp_path / ".dstack" / "profiles.yml").write_text(
        "profiles: [{name: short, default: true, max_duration: 20m, max_price: 9}]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FROM_HERE", "from here")
    task = target.task(
        "echo $FROM_HERE, $GIVEN, $FIXED",
        "echo ${{ run.args }} '$${{ kept }}' $NOT_SET.",
        env=["FROM_HERE", "GIVEN", "FIXED=1"],
        max_price=3,
    )
    path = tmp_path / ".dstack.yml"
    path.write_text(yaml.safe_dump(task))
    with target.client() as client:
        run = client.runs.submit(path, env={"GIVEN": "given", "FIXED": "2"}, args=["--name", "a b"])
        lines = lines_of(target, run)
    assert lines == ["from here, given, 2", "--name a b ${{ kept }} ."]
    shown = echoed(target, run)
    assert shown["run_spec"]["profile"]["name"] == "short"
    job = shown["jobs"][0]["job_spec"]
    assert job["max_duration"] == 20 * 60
    assert job["requirements"]["max_price"] == 3


def test_the_async_client_fills_in_the_same(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".dstack").mkdir()
    (tmp_path / ".dstack" / "profiles.yaml").write_text("profiles: [{name: named, max_price: 2}]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FROM_HERE", "from here")
    task = target.task("echo $FROM_HERE $GIVEN ${{ run.args }}", env=["FROM_HERE", "GIVEN"])

    async def run() -> list[bytes]:
        async with target.async_client() as client:
            with pytest.raises(
                dstack.ConfigurationError, match=r"^env: expected a value for GIVEN, got none"
            ):
                await client.runs.plan(task)
            await client.runs.plan(task, env={"GIVEN": "x"}, profile="named")
            run = await client.runs.submit(task, env={"GIVEN": "given"}, args=["a b"], profile="named")
            outcome = await run.wait(target.timeout, poll_interval=target.poll_interval)
            assert outcome.succeeded, outcome.message
            return b"".join([piece async for piece in run.logs()]).split()

    assert asyncio.run(run()) == [b"from", b"here", b"given", b"a", b"b"]


@pytest.mark.parametrize("directory", ["~", "~/below"])
def test_a_working_directory_in_the_home_is_resolved_on_the_machine(target: Target, directory: str) -> None:
    task = target.task(f'[ "$PWD" = "$(eval echo {directory})" ] && echo there', working_dir=directory)
    with target.client() as client:
        if target.release < (0, 19, 27):
            with pytest.raises(
                dstack.UnsupportedServerError, match=r"working_dir outside of /workflow: needs"
            ):
                client.runs.submit(task)
            return
        assert lines_of(target, client.runs.submit(task)) == ["there"]


@pytest.mark.real
@pytest.mark.parametrize("name", FILES)
def test_a_real_server_reads_the_files_that_people_have(request: pytest.FixtureRequest, name: str) -> None:
    real: Target = request.getfixturevalue("_real")
    configuration = dstack.parse_configuration(FILES[name])
    with real.client() as client:
        try:
            client.runs.plan(configuration, env=ENV, args=["--epochs", "3"])
        except dstack.UnsupportedServerError as error:
            refusal = str(error)
        else:
            refusal = ""
    if real.release >= (0, 21, 3):
        assert refusal == ""
    elif refusal:
        # Our client refuses it before the server sees the file.
        assert re.search(r": needs dstack >= \d", refusal)


HINT = "gpu memory: 13GB is an exact size; write 13GB.. for at least that."


def test_an_exact_size_that_no_machine_has_is_named(target: Target) -> None:
    exact = target.task("true", resources={"gpu": "13GB", "disk": None})
    with target.client() as client:
        plan = client.runs.plan(exact)
        assert (plan.offers, plan.hints) == ((), (HINT,))
        hints = client.runs.plan(exact, resources={"gpu": "13GB..", "disk": None}).hints
        # A real machine of the tests has no GPU, which is a hint about its fleet.
        assert not any("exact size" in hint for hint in hints)
        run = client.runs.submit(exact)
        with pytest.raises(dstack.NoCapacityError, match=re.escape(HINT)):
            run.wait(target.timeout, poll_interval=target.poll_interval).raise_for_status()
