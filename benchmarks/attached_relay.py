"""Read the log of an attached run, live over SSH, and compare it with the same bytes fetched with bare ``requests``.

The run is on a real dstack server with a simulated SSH host, in a different process from the client.
"""

from __future__ import annotations

import base64
import json
import multiprocessing
import socket
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import requests

from benchmarks.results import Row, Section, cli
from dstack_core import Client, Task
from dstack_core._attach.attachment import Attachment
from tests.rig.server import RealServer

SHARE = 0.8
LINE_BYTES = 100
_VERSION = "0.22.5"


def serve(told: Connection) -> None:
    """Serve in this process until a message arrives."""
    with RealServer(version=_VERSION) as server:
        told.send((server.url, server.token, server.project, server.fleet))
        told.recv()


def bare(url: str, token: str, project: str, name: str, submission: str) -> int:
    """Fetch and decode the log that the server stores; return its bytes."""
    session = requests.Session()
    session.headers["Authorization"] = f"Bearer {token}"
    body: dict[str, Any] = {"run_name": name, "job_submission_id": submission, "limit": 1000}
    size = 0
    while True:
        page = session.post(f"{url}/api/project/{project}/logs/poll", json=body, timeout=60).json()
        size += len(b"".join(base64.b64decode(message["message"]) for message in page["logs"]))
        if page["next_token"] is None:
            return size
        body["next_token"] = page["next_token"]


def send_plain(told: Connection, size: int) -> None:
    """Send ``size`` bytes to each client that connects, as a program in the container would."""
    data = b"x" * (LINE_BYTES - 2) + b"\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        told.send(listening.getsockname()[1])
        while True:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(data * (size // LINE_BYTES))


def tunnel_alone(attachment: Attachment, port: int, size: int) -> None:
    """Read bytes from a channel through the same logins, without websocket and log."""
    channel = attachment.channel(port, 30)
    try:
        while size > 0 and (data := channel.recv(262144)):
            size -= len(data)
    finally:
        channel.close()


def measure(quick: bool) -> Section:
    """Have a run write its log, then read it several times."""
    lines, rounds = (20_000, 3) if quick else (100_000, 5)
    size = lines * LINE_BYTES
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,))
    server.start()
    ours_plain, theirs_plain = multiprocessing.Pipe()
    sender = multiprocessing.get_context("spawn").Process(target=send_plain, args=(theirs_plain, size))
    sender.start()
    try:
        port = ours_plain.recv()
        url, token, project, fleet = ours.recv()
        with Client(server_url=url, project_name=project, user_token=token) as client:
            text = f"awk 'BEGIN {{ for (i = 0; i < {lines}; i++) printf \"%098d\\n\", i }}'"
            task: Any = Task(commands=[text, "echo the-end", "sleep 600"], user="root", fleets=[fleet])
            run = client.runs.submit(task)
            live, kept, limit = [], [], []
            with run.attach(timeout=120, poll_interval=0.5):
                submission = _submission(url, token, project, run.id)
                deadline = time.monotonic() + 120
                while bare(url, token, project, run.name, submission) < size:
                    if time.monotonic() > deadline:
                        raise TimeoutError("the server does not have the whole log")
                    time.sleep(0.5)
                for _ in range(rounds + 1):
                    started, read = time.perf_counter(), 0
                    for chunk in run.logs():
                        read += len(chunk)
                        if read >= size:
                            break
                    live.append(time.perf_counter() - started)
                    started = time.perf_counter()
                    bare(url, token, project, run.name, submission)
                    kept.append(time.perf_counter() - started)
                    assert run._attachment is not None  # noqa: S101 - it is attached
                    started = time.perf_counter()
                    tunnel_alone(run._attachment, port, size)
                    limit.append(time.perf_counter() - started)
            run.stop(abort=True)
    finally:
        ours.send("end")
        server.join(60)
        server.kill()
        sender.kill()
    # The first round loads modules and warms caches.
    mine, base, tunnel = (statistics.median(times[1:]) for times in (live, kept, limit))
    row = Row(
        "log relay, attached, live over SSH",
        f"{lines / mine:,.0f} lines/s, {size / mine / 1e6:.1f} MB/s",
        f"bare `requests` from the same server: {lines / base:,.0f} lines/s, {size / base / 1e6:.1f} MB/s",
        f"{base / mine:.0%}",
        "at least 80%",
        base / mine >= SHARE,
    )
    note = (
        f"Attached: {lines:,} lines of {LINE_BYTES} bytes, read from the first line, through an SSH login and "
        "a websocket, while the run is active. The server and the SSH hosts are in another process. The tunnel alone, "
        f"without websocket and log, transfers as many bytes at {size / tunnel / 1e6:.1f} MB/s. Both of its ends are "
        "Python (`paramiko`), and each byte is encrypted twice, once for each login."
    )
    return Section("Log relay, attached", [row], notes=[note])


def _submission(url: str, token: str, project: str, run_id: str) -> str:
    reply = requests.post(
        f"{url}/api/project/{project}/runs/get",
        json={"id": run_id},
        headers={"Authorization": f"Bearer {token}"},
        timeout=60,
    )
    return str(json.loads(reply.text)["latest_job_submission"]["id"])


if __name__ == "__main__":
    cli(measure)
