"""Run the example flow on a real Prefect server and an embedded dstack server; leave nothing behind.

Run it with the Python of the Prefect environment. Exits with 0 only if the flow run succeeded.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
FLOW_FILE = REPOSITORY / "flows" / "example_dstack_run.py"
START_SECONDS = 180
FLOW_SECONDS = 300
_STARTED = time.monotonic()


def say(text: str) -> None:
    """Show progress, with the seconds since the start."""
    print(f"[{time.monotonic() - _STARTED:5.1f} s] {text}", flush=True)


def configure_prefect(home: Path, port: int) -> None:
    """Point Prefect at a home and a server of its own, through the environment, which it reads at import."""
    for name in [name for name in os.environ if name.startswith(("PREFECT_", "DSTACK_"))]:
        del os.environ[name]
    os.environ.update(
        {
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_LOGGING_COLORS": "false",
            "DO_NOT_TRACK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
    )


@contextlib.contextmanager
def prefect_server(home: Path, port: int) -> Iterator[None]:
    """Run a Prefect server until the block ends. Raises RuntimeError if it does not start."""
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    log = home / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(f"http://127.0.0.1:{port}/api/health"):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the Prefect server did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def answers(url: str) -> bool:
    """Return whether the address answers with 200."""
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as reply:  # noqa: S310
        return bool(reply.status == 200)
    return False


def free_port() -> int:
    """Return a port of this machine that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def main() -> int:
    """Run the demo; return the exit status of the process."""
    from dstack_core.local import LocalServer

    with tempfile.TemporaryDirectory(prefix="prefect-demo-") as directory, LocalServer() as server:
        home, port = Path(directory), free_port()
        say(f"embedded dstack server on {server.url}")
        configure_prefect(home, port)
        for name, value in (("SERVER_URL", server.url), ("PROJECT", server.project), ("TOKEN", server.token)):
            os.environ[f"DSTACK_{name}"] = value
        say("starting a Prefect server ...")
        with prefect_server(home, port):
            say("running the flow example_dstack_run; the log of the run follows")
            # In a process of its own, the flow sends its last log records before the server ends.
            status = subprocess.run([sys.executable, FLOW_FILE], timeout=FLOW_SECONDS).returncode
        with server.client() as client:
            outcomes = [run.outcome() for run in client.runs.list(all=True)]
        say(f"the flow's process ended with {status}")
        for outcome in filter(None, outcomes):
            for name in ("run_name", "status", "exit_status", "instance", "duration", "cost"):
                say(f"  {name}: {getattr(outcome, name)}")
        succeeded = [outcome is not None and outcome.succeeded for outcome in outcomes]
        return 0 if status == 0 and succeeded == [True] else 1


if __name__ == "__main__":
    sys.exit(main())
