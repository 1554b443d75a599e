"""A dstack server that sends canned bytes, fast enough not to be the bottleneck.

It replies as a real one does, for runs that are all alike: ``running`` without output, or with a line every few
seconds. One more run, called ``speaker``, has a log of a given size. ``with Stub(...) as stub`` runs it as a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import re
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_ROOT = Path(__file__).parent.parent
_RUN = _ROOT / "tests/data/wire/runs_get_running_ssh_fleet_0.22.5.json"
_BEGAN = datetime(2026, 11, 23, tzinfo=UTC)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PAGE = 100
_LOG_PAGE = 1000
_SPEAKER = "speaker"
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


# What a real server changes at every poll of a run that does nothing; ``_as_of_now`` writes over them.
_COST, _PROCESSED = b"0.987654321", b"2000-01-01T00:00:00.000000Z"


class Answers:
    """The replies of the server."""

    def __init__(
        self, runs: int, lines: int, line_bytes: int, lines_a_message: int, line_seconds: float = 0
    ) -> None:
        body: dict[str, Any] = json.loads(_RUN.read_text())["response"]["json"]
        self.counts: Counter[str] = Counter()
        self._runs = [_run(body, f"id-{index}", f"run-{index}", index, "running") for index in range(runs)]
        self._speaker = _run(body, _SPEAKER, _SPEAKER, runs, "done")
        self._pages = _log_pages(lines, line_bytes, lines_a_message)
        self._line_gap = round(line_seconds * 1_000_000)
        self._started = _microseconds(datetime.now(UTC))
        # Built once, because they are the same in every round of polls.
        self._lists = {
            top: b"[" + b",".join(self._runs[max(0, top - _PAGE) : top][::-1]) + b"]"
            for top in range(runs, -_PAGE, -_PAGE)
        }

    def reply(self, path: str, asked: dict[str, Any]) -> bytes:
        """Return the body of the reply to one request."""
        call = "/".join(path.split("/")[-2:])
        self.counts[call] += 1
        if call == "runs/get":
            name = asked.get("id") or asked["run_name"]
            run = self._speaker if name == _SPEAKER else self._runs[int(name.rpartition("-")[2])]
            return _as_of_now(run)
        if call == "runs/list":
            top = int(asked.get("prev_run_id", f"id-{len(self._runs)}").removeprefix("id-"))
            return _as_of_now(self._lists.get(max(top, 0), b"[]"))
        if call == "logs/poll" and asked["run_name"] == _SPEAKER:
            return self._pages[int(asked.get("next_token") or 0)]
        if call == "logs/poll" and self._line_gap:
            return self._lines_since(int(asked["run_name"].rpartition("-")[2]), asked.get("start_time"))
        if call == "bench/counts":
            return json.dumps(self.counts).encode()
        return b'{"logs": [], "next_token": null, "external_url": null}'

    def _lines_since(self, index: int, start_time: str | None) -> bytes:
        """Return the lines of a run behind a time; the runs' lines are spread over the gap between two."""
        first = self._started + self._line_gap * index // len(self._runs)
        since = _microseconds(datetime.fromisoformat(start_time)) if start_time else first - 1
        now = _microseconds(datetime.now(UTC))
        missed = max(0, -(-(since + 1 - first) // self._line_gap))
        moments = range(first + missed * self._line_gap, now, self._line_gap)
        # A client asks again for the line that it read last: ``start_time`` is a microsecond before it.
        for moment in moments[1 if start_time else 0 :]:
            self.counts["bench/lines"] += 1
            self.counts["bench/line_milliseconds"] += (now - moment) // 1000
        text = base64.b64encode(b"step\r\n").decode()
        logs = [
            {
                "timestamp": _stamp(_EPOCH + timedelta(microseconds=moment)),
                "log_source": "stdout",
                "message": text,
            }
            for moment in moments
        ]
        return json.dumps({"logs": logs, "next_token": None, "external_url": None}).encode()


def _microseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)


def _stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _run(body: dict[str, Any], run_id: str, name: str, index: int, status: str) -> bytes:
    copy = json.loads(json.dumps(body))
    submitted = (_BEGAN + timedelta(seconds=index)).isoformat()
    copy |= {"id": run_id, "submitted_at": submitted, "status": status, "cost": float(_COST)}
    copy["last_processed_at"] = _PROCESSED.decode()
    copy["run_spec"]["run_name"] = name
    jobs = [copy["latest_job_submission"], *(job["job_submissions"][-1] for job in copy["jobs"])]
    for submission in jobs:
        submission |= {"id": f"sub-{run_id}", "status": status, "last_processed_at": _PROCESSED.decode()}
    return json.dumps(copy).encode()


def _as_of_now(body: bytes) -> bytes:
    now = datetime.now(UTC)
    cost = f"{now.timestamp() / 1e9:.9f}"
    return body.replace(_COST, cost.encode()).replace(_PROCESSED, now.isoformat().encode())


def _log_pages(lines: int, line_bytes: int, lines_a_message: int) -> list[bytes]:
    messages: list[dict[str, Any]] = []
    for first in range(0, lines, lines_a_message):
        numbers = range(first, min(lines, first + lines_a_message))
        text = b"".join(f"{number:09d} ".encode().ljust(line_bytes - 2, b"x") + b"\r\n" for number in numbers)
        moment = _BEGAN + timedelta(milliseconds=len(messages))
        messages.append(
            {"timestamp": _stamp(moment), "log_source": "stdout", "message": base64.b64encode(text).decode()}
        )
    pages = []
    for page, first in enumerate(range(0, max(1, len(messages)), _LOG_PAGE), start=1):
        token = str(page) if first + _LOG_PAGE < len(messages) else None
        body = {"logs": messages[first : first + _LOG_PAGE], "external_url": None, "next_token": token}
        pages.append(json.dumps(body).encode())
    return pages


class _Connection(asyncio.Protocol):
    """A connection that speaks as much of HTTP/1.1 as requests and httpx need."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - of a stream server it is
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            found = _LENGTH.search(self._received, 0, end)
            whole = end + 4 + (int(found[1]) if found else 0)
            if len(self._received) < whole:
                return
            head, body = self._received[:end], self._received[end + 4 : whole]
            self._received = self._received[whole:]
            path = head.split(b" ", 2)[1].decode()
            answer = self._answers.reply(path, json.loads(body or b"{}"))
            start = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            self._transport.write(start % len(answer) + answer)


class Stub:
    """The server as a process on a free port of loopback; ``url`` is its address.

    ``runs`` is the number of watched runs, each with a line every ``line_seconds`` (0: without output). The log of the run ``speaker`` has ``lines`` lines of ``line_bytes`` bytes,
    ``lines_a_message`` to a message.
    """

    token = "benchmark"  # noqa: S105 - it is not checked

    def __init__(
        self,
        *,
        runs: int = 0,
        lines: int = 0,
        line_bytes: int = 100,
        lines_a_message: int = 1,
        line_seconds: float = 0,
    ) -> None:
        numbers = (runs, lines, line_bytes, lines_a_message, line_seconds)
        self._arguments = [str(number) for number in numbers]
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.stub_server", *self._arguments],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None  # noqa: S101 - asked for
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def counts(self) -> Counter[str]:
        """Return how often each call was made so far."""
        import urllib.request

        request = urllib.request.Request(f"{self.url}/bench/counts", data=b"{}")  # noqa: S310 - loopback
        with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
            found: Counter[str] = Counter(json.loads(reply.read()))
        del found["bench/counts"]
        return found


async def _serve(answers: Answers) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(answers), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    # It ends with the process that started it.
    await loop.run_in_executor(None, sys.stdin.read)


def main() -> None:
    """Serve until the standard input is closed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("numbers", type=int, nargs=4)
    parser.add_argument("line_seconds", type=float)
    chosen = parser.parse_args()
    asyncio.run(_serve(Answers(*chosen.numbers, chosen.line_seconds)))


if __name__ == "__main__":
    main()
