"""How many requests it takes to submit a run and to get its first status, for our client and the official one."""

from __future__ import annotations

import subprocess
import tempfile

from benchmarks.counting_proxy import CountingProxy
from benchmarks.imports import OFFICIAL
from benchmarks.results import Row, Section, Table, cli
from dstack_core import Client, Run, Task
from tests.rig.server import RealServer

LIMIT = 2
_OFFICIAL = """
import sys
from dstack.api import Client, Task
url, token, project = sys.argv[1:]
client = Client.from_config(project_name=project, server_url=url, user_token=token)
for number in range(2):
    run = client.runs.apply_configuration(Task(name=f"official-{number}", commands=["true"]))
    print(run.status.value, flush=True)
    sys.stdin.readline()
    run.refresh()
    print(run.status.value, flush=True)
    sys.stdin.readline()
"""


def official(proxy: CountingProxy, server: RealServer) -> list[list[str]]:
    """Return the requests of the official client, step by step."""
    with tempfile.TemporaryDirectory() as home:
        process = subprocess.Popen(
            [str(OFFICIAL.absolute()), "-c", _OFFICIAL, proxy.url, server.token, server.project],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=home,
            env={"HOME": home, "PATH": "/usr/bin:/bin"},
        )
        try:
            assert process.stdin is not None  # noqa: S101 - asked for
            assert process.stdout is not None  # noqa: S101
            asked = []
            for _ in range(4):
                if not process.stdout.readline():
                    raise RuntimeError("the official client did not submit")
                asked.append(proxy.take())
                print(file=process.stdin, flush=True)
            return asked
        finally:
            process.kill()
            process.communicate()


def ours(proxy: CountingProxy, server: RealServer) -> list[list[str]]:
    """Return the requests of our client, step by step."""
    asked = []
    with Client(server_url=proxy.url, project_name=server.project, user_token=server.token) as client:

        def steps(marker: str | None = None) -> None:
            run: Run = client.runs.submit(Task(commands=["true"]), marker=marker)
            assert run.raw_status == "submitted"  # noqa: S101
            asked.append(proxy.take())
            run.status()
            asked.append(proxy.take())

        for marker in (None, None, "workflow"):
            steps(marker)
    return asked


def measure(quick: bool) -> Section:
    """Count on a real server; the numbers are the same every time."""
    with RealServer(version="0.22.5") as server, CountingProxy(server.url) as proxy:
        theirs, our = official(proxy, server), ours(proxy, server)
    names = [
        ("official client, first `apply_configuration`", theirs[0], theirs[1]),
        ("official client, any later one", theirs[2], theirs[3]),
        ("first `submit` of a client", our[0], our[1]),
        ("any later `submit`", our[2], our[3]),
        ("any later `submit` with a `marker`, as the operators do", our[4], our[5]),
    ]
    row = Row(
        "requests to submit and get the first status",
        f"{len(our[0])} the first time, then {len(our[2])}; "
        f"with `run.status()`, which polls again, {len(our[0] + our[1])}, then {len(our[2] + our[3])}",
        f"`apply_configuration`: {len(theirs[0])}, then {len(theirs[2])}; with `refresh()` "
        f"{len(theirs[0] + theirs[1])}, then {len(theirs[2] + theirs[3])}",
        f"{len(theirs[0])} : {len(our[0])}",
        f"at most {LIMIT}",
        len(our[0]) <= LIMIT,
    )
    table = Table(
        "Requests counted between the client and a real server, 0.22.5",
        ["what", "requests", "which", "another poll"],
        [[name, str(len(asked)), ", ".join(asked), ", ".join(look)] for name, asked, look in names],
    )
    note = (
        "For both clients, the reply to the submission contains the first status. The first submit of a client "
        "fetches the user's SSH key. If the caller passes a `marker`, a run may already exist, so the client looks it "
        "up first. This lookup ensures that a retried workflow step has a single run."
    )
    return Section("Submit", [row], [table], notes=[note])


if __name__ == "__main__":
    cli(measure)
