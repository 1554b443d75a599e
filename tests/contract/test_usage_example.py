"""The usage example of the documented API as a user runs it: in its own process, on a real server with a GPU host."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import yaml

import dstack_core as dstack
from tests.contract.conftest import stop_and_wait
from tests.docs.blocks import Block, blocks
from tests.ports import free_port
from tests.rig.server import RealServer

pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = Path(__file__).with_name("usage_example.py")
# Stands for the program of the example's image: it prints its arguments and answers on its port.
LAUNCHER = """#!{python}
import os, sys, http.server

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"OK")
        if self.path == "/end":
            raise SystemExit(0)
    def log_message(self, *_): pass

class Server(http.server.HTTPServer):
    def handle_error(self, *_): raise

server = Server(("127.0.0.1", {port}), Answer)
print("launched", *sys.argv[1:], os.environ["MODEL_ID"], flush=True)
print("in", sorted(os.listdir(".")), flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def launcher_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def gpu_server(tmp_path_factory: pytest.TempPathFactory, launcher_port: int) -> Iterator[RealServer]:
    programs = tmp_path_factory.mktemp("programs")
    launcher = programs / "text-generation-launcher"
    launcher.write_text(LAUNCHER.format(python=sys.executable, port=launcher_port))
    launcher.chmod(launcher.stat().st_mode | stat.S_IXUSR)
    with RealServer(gpus=4, blocks=4, images=True, path=[programs], routes={80: launcher_port}) as server:
        yield server


@pytest.fixture
def example(
    gpu_server: RealServer, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start the example with a separate home, on the port of the test; on 8080 only where it is free."""
    (tmp_path / ".dstack").mkdir()
    project = {"name": gpu_server.project, "url": gpu_server.url, "token": gpu_server.token, "default": True}
    (tmp_path / ".dstack" / "config.yml").write_text(yaml.safe_dump({"projects": [project]}))
    (tmp_path / "dstack-examples").mkdir()
    (tmp_path / "dstack-examples" / "prompt.txt").write_text("hello")
    port = request.param or free_port()
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        port = free_port()
    source = EXAMPLE.read_text().replace("8080:80", f"{port}:80")
    script = tmp_path / "example.py"
    script.write_text(source)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        },
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield process, port
    process.kill()
    process.communicate()


def lines_up_to(process: subprocess.Popen[str], text: str) -> list[str]:
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if text in line:
            return lines
    pytest.fail("\n".join(lines))


def run_named_in(lines: list[str], server: RealServer) -> dstack.Run:
    name = next(line for line in lines if line.startswith("Run ")).split()[1].rstrip(":")
    client = dstack.Client(server_url=server.url, project_name=server.project, user_token=server.token)
    run = client.runs.get(name)
    assert run is not None
    return run


@pytest.mark.parametrize("example", [8080], indirect=True)
def test_the_usage_example_runs_as_printed(
    example: tuple[subprocess.Popen[str], int], gpu_server: RealServer
) -> None:
    process, port = example
    lines = lines_up_to(process, "in [")
    assert lines[:2] == ["Initializing the client...", "Submitting the run..."]
    assert lines[2].startswith("Run task-")
    assert lines[2].endswith(": submitted")
    assert lines[3:] == [
        "Attaching to the run...",
        "launched --trust-remote-code --quantize gptq TheBloke/Llama-2-13B-chat-GPTQ",
        "in ['prompt.txt']",
    ]
    assert requests.get(f"http://127.0.0.1:{port}/health", timeout=30).status_code == 200
    requests.get(f"http://127.0.0.1:{port}/end", timeout=30)
    rest, _ = process.communicate(timeout=200)
    assert (process.returncode, rest) == (0, "")
    run = run_named_in(lines, gpu_server)
    assert run.wait(timeout=200, poll_interval=0.5).succeeded


# Another port: this test may run beside the one above.
@pytest.mark.parametrize("example", [None], indirect=True)
def test_an_interrupt_of_the_usage_example_aborts_the_run(
    example: tuple[subprocess.Popen[str], int], gpu_server: RealServer
) -> None:
    process, _ = example
    lines = lines_up_to(process, "in [")
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=200)
    assert (process.returncode, rest) == (0, "Aborting the run...\n")
    # A busy server may drop the stop, so it is repeated (see docs/how-it-works.md).
    assert stop_and_wait(run_named_in(lines, gpu_server), abort=True).status == dstack.RunStatus.ABORTED


@pytest.mark.parametrize("block", blocks("python attach"), ids=str)
def test_attach_blocks_of_the_documentation_run_as_printed(
    block: Block, gpu_server: RealServer, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", block.code],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "PYTHONPATH": str(ROOT),
            "DSTACK_SERVER_URL": gpu_server.url,
            "DSTACK_PROJECT": gpu_server.project,
            "DSTACK_TOKEN": gpu_server.token,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "200\n"), done.stderr
