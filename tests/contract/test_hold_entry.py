"""How a person gets into a held container: each way that the error names, entered as it is shown."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import dstack_core as dstack
from tests.contract.conftest import Target
from tests.contract.official_client import OfficialClient
from tests.contract.test_hold import ended, failed, held
from tests.local.support import wait_until
from tests.rig.server import RealServer
from tests.rig.server_process import DEFAULT_VERSION

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def variables(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return the environment of a person: the server's address, a home without keys.

    Servers before 0.19.33 keep no key of the user, so the home is that of the client that submits, too.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    return {
        **os.environ,
        "HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "DSTACK_SERVER_URL": target.url,
        "DSTACK_PROJECT": target.project,
        "DSTACK_TOKEN": target.token,
    }


def entered(line: str, variables: dict[str, str], *more: str, given: str = "") -> str:
    """Return what the line shows, entered in a shell with this Python."""
    python = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}'
    text = f"{python}\n{line} {shlex.join(more)}"
    return subprocess.run(
        ["sh", "-c", text],
        input=given,
        env=variables,
        cwd="/",
        stdout=subprocess.PIPE,
        text=True,
        timeout=240,
        check=True,
    ).stdout


def shown_lines(run: dstack.Run) -> tuple[str, str]:
    """Return the line that opens a shell and the one that ends the hold, as the log shows them."""
    log = b"".join(run.logs()).decode()
    found = [re.search(rf"^{start}: (.+?)\r?$", log, re.MULTILINE) for start in SHOWN]
    assert all(found), log
    line, end = (one.group(1) for one in found if one)
    return line, end


SHOWN = ("To open a shell in it", "To end it")


def test_the_lines_of_the_log_open_a_shell_and_end_the_hold(
    target: Target, client: dstack.Client, variables: dict[str, str]
) -> None:
    with held(target, client, "exit 3") as run:
        outcome = failed(target, run)
        line, end = shown_lines(run)
        assert (line, end) == (outcome.debug_command, f"touch {outcome.debug_done}")
        if target.kind == "local":
            assert entered(line, variables, given=f"echo $DSTACK_RUN_NAME\n{end}\n") == f"{run.name}\n"
        else:
            # The containers of this rig run commands, and no shell for a person.
            script = f"echo $DSTACK_RUN_NAME; {end}"
            assert entered(line, variables, "--", "sh", "-c", script) == f"{run.name}\n"
        last, _ = ended(target, run)
        assert last.exit_status == 3
        assert 0 < last.debug_seconds < 600
    if target.kind == "local":
        with pytest.raises(subprocess.CalledProcessError):
            entered(line, variables)


@contextmanager
def with_nodes(target: Target, number: int) -> Iterator[Target]:
    """Yield a server that has as many machines."""
    if target.server is None:
        yield target
        return
    name = f"{target.project}-{uuid.uuid4().hex[:8]}"
    with RealServer(at=target.server.address, project=name, hosts=number, blocks=1) as server:
        needs = {**target.needs, **({"fleets": [server.fleet]} if "fleets" in target.needs else {})}
        yield Target("real", server.url, server.token, name, needs, target.timeout, target.release, server)


@contextmanager
def failed_second_node(
    target: Target, client: dstack.Client, folder: Path
) -> Iterator[tuple[dstack.Run, dstack.Outcome]]:
    """Yield a run whose node 1 of two has failed and is held, and its outcome; all nodes must end with it."""
    command = (
        f"echo $$ > {folder}/pid-$DSTACK_NODE_RANK; [ $DSTACK_NODE_RANK = 1 ] || sleep 600; "
        f"until [ -s {folder}/pid-0 ]; do sleep 0.1; done; exit 3"
    )
    name = f"held-{uuid.uuid4().hex[:8]}"
    run = client.runs.submit(target.task(command, nodes=2), name, debug_on_failure="10m")
    try:
        outcome = failed(target, run)
        assert (outcome.status, outcome.exit_status) == (dstack.RunStatus.FAILED, 3)
        assert outcome.debug_command == f"python -m dstack_core attach {run.name} --node 1"
        pids = [int((folder / f"pid-{node}").read_text()) for node in (0, 1)]
        assert all(map(is_alive, pids)), "the other node keeps running"
        yield run, outcome
        last, _ = ended(target, run)
        assert (last.status, last.exit_status) == (dstack.RunStatus.FAILED, 3)
        assert 0 < last.debug_seconds < 600
        assert wait_until(lambda: not any(map(is_alive, pids)), 60)
    finally:
        run.stop(abort=True)


def test_a_failed_node_of_two_is_entered_and_its_end_is_that_of_all(
    target: Target, variables: dict[str, str], tmp_path: Path
) -> None:
    with with_nodes(target, 2) as many, many.client() as client:
        variables.update(DSTACK_PROJECT=many.project)
        with failed_second_node(many, client, tmp_path) as (_, outcome):
            script = f"echo $DSTACK_NODE_RANK; touch {outcome.debug_done}"
            assert entered(outcome.debug_command, variables, "--", "sh", "-c", script) == "1\n"


def test_a_stop_of_a_run_with_a_failed_node_ends_all(
    target: Target, client: dstack.Client, tmp_path: Path
) -> None:
    if target.kind == "real":
        pytest.skip("two machines take a minute there")
    with failed_second_node(target, client, tmp_path) as (run, _):
        run.stop()


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.real
@pytest.mark.skipif(DEFAULT_VERSION != "0.22.5", reason="this command line is that of 0.22.5")
@pytest.mark.skipif(shutil.which("ssh") is None, reason="OpenSSH's client is needed")
def test_openssh_and_the_address_of_vs_code_name_the_run(target: Target, client: dstack.Client) -> None:
    """``dstack attach`` adds the run as a host, which ``ssh`` and editors use."""
    assert target.kind == "local" or target.server is not None
    with held(target, client, "exit 3") as run, tempfile.TemporaryDirectory(prefix="d-") as home:
        outcome = failed(target, run)
        official = OfficialClient(target, Path(home))
        attached = official.start("attach", run.name)
        try:
            config = Path(home) / ".dstack" / "ssh" / "config"

            def is_known() -> bool:
                assert attached.poll() is None, attached.communicate()
                return config.exists() and f"Host {run.name}\n" in config.read_text()

            assert wait_until(is_known, 240)
            # The authority and the absolute path of the address: vscode://vscode-remote/ssh-remote+HOST/PATH.
            page = (ROOT / "docs/how-to/get-a-shell-in-a-failed-run.md").read_text()
            (address,) = re.findall(r"vscode://[^`]+", page)
            host = re.fullmatch(r"vscode://vscode-remote/ssh-remote\+([^/+]+)/[^/].*", address)
            assert host is not None
            assert f"`ssh {host[1]}`" in page
            command = ["ssh", "-F", str(config), run.name, f"touch {outcome.debug_done}"]
            said = subprocess.run(
                command, env=official.variables, capture_output=True, text=True, timeout=120
            )
            assert said.returncode == 0, said.stderr
        finally:
            attached.send_signal(signal.SIGINT)
            attached.communicate(timeout=60)
        last, _ = ended(target, run)
        assert last.exit_status == 3
        assert 0 < last.debug_seconds < 600
