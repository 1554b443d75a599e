"""Replies that must not be trusted: in both transports they end in one error of ours."""

from __future__ import annotations

import asyncio
import gzip
import json
import resource
import socket
import tempfile
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import dstack_core as dstack
from tests.core.scripted import run_json
from tests.faults.raw_server import Answer, answering, repeating, whole

TOKEN = "the-secret-token"
KINDS = pytest.mark.parametrize("kind", ["sync", "async"])
HEAD = b"HTTP/1.1 200 OK\r\n"
# Seconds: far more than any of these may take on a busy machine.
PATIENCE = 30.0


def get(kind: str, url: str, **arguments: Any) -> Any:
    """Get a run with one request."""
    arguments = {"retry_budget": 0.0, "timeout": 0.2} | arguments
    if kind == "sync":
        with dstack.Client(server_url=url, project_name="main", user_token=TOKEN, **arguments) as client:
            return client.runs.get("train")

    async def go() -> Any:
        async with dstack.AsyncClient(
            server_url=url, project_name="main", user_token=TOKEN, **arguments
        ) as client:
            return await client.runs.get("train")

    return asyncio.run(go())


ENDLESS: dict[str, Callable[[], Answer]] = {
    "a head byte by byte": lambda: repeating(HEAD + b"X-Long: ", b"x", 0.05),
    "a status line byte by byte": lambda: repeating(b"HTTP/1.1 200 ", b"O", 0.05),
    "100 without end": lambda: repeating(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "103 without end": lambda: repeating(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "headers without end": lambda: repeating(HEAD, b"X-More: " + b"x" * 1000 + b"\r\n"),
    "one header without end": lambda: repeating(HEAD + b"X-Long: ", b"x" * 65536),
    "no HTTP at all": lambda: repeating(b"", b"SSH-2.0-what\r\n"),
    "tiny chunks": lambda: repeating(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", 0.05),
    "chunk extensions without end": lambda: repeating(
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;", b"x" * 65536
    ),
    "trailers without end": lambda: repeating(
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n \r\n0\r\n", b"X-More: x\r\n"
    ),
    "a compressed body without end": lambda: repeating(
        HEAD + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b" ")[:-8], b"\x00\x00\x00\xff\xff", 0.05
    ),
}


@KINDS
@pytest.mark.parametrize("what", ENDLESS)
def test_an_endless_reply_ends_in_an_error(kind: str, what: str) -> None:
    with answering(ENDLESS[what]()) as url:
        began = time.monotonic()
        with pytest.raises(dstack.DstackError):
            get(kind, url)
        assert time.monotonic() - began < PATIENCE


def bomb(form: str) -> bytes:
    """Return 1 GiB of spaces, compressed to one megabyte; ``many`` has many parts."""
    if form == "many":
        return gzip.compress(b" " * (64 * 1024 * 1024)) * 16
    packer = zlib.compressobj(9, wbits={"gzip": 31, "deflate": 15}[form])
    parts = [packer.compress(b" " * (16 * 1024 * 1024)) for _ in range(64)]
    return b"".join(parts) + packer.flush()


@KINDS
@pytest.mark.parametrize("form", ["gzip", "deflate", "many"])
def test_a_small_reply_that_inflates_does_not_fill_the_memory(
    kind: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dstack_core._transport.settings.LARGEST_REPLY", 10_000_000)
    data = bomb(form)
    assert len(data) < 3_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    encoding = "deflate" if form == "deflate" else "gzip"
    with (
        answering(whole(data, f"Content-Encoding: {encoding}")) as url,
        pytest.raises(dstack.ProtocolError, match="no dstack server sends"),
    ):
        get(kind, url, timeout=10.0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 100_000_000


@KINDS
def test_a_compressed_reply_is_read_whole(kind: str) -> None:
    packed = gzip.compress(json.dumps(run_json("done")).encode())
    half = len(packed) // 2
    for data in (packed, gzip.compress(b" ") + packed):
        with answering(whole(data, "Content-Encoding: gzip")) as url:
            assert get(kind, url).status is not None
    with (
        answering(whole(packed[:half], "Content-Encoding: gzip")) as url,
        pytest.raises(dstack.ServerUnreachableError, match="the compressed reply is incomplete"),
    ):
        get(kind, url)
    with (
        answering(whole(b"x" * 100, "Content-Encoding: gzip")) as url,
        pytest.raises(dstack.ServerUnreachableError),
    ):
        get(kind, url)


@KINDS
@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "x" * 9999])
def test_reports_an_encoding_that_was_not_requested(kind: str, encoding: str) -> None:
    with (
        answering(whole(b"{}", f"Content-Encoding: {encoding}")) as url,
        pytest.raises(dstack.ProtocolError, match="expected no encoding, gzip or deflate"),
    ):
        get(kind, url)


@KINDS
def test_redirects_in_a_circle_are_not_followed(kind: str) -> None:
    asked: list[int] = []

    def around(connection: socket.socket) -> None:
        asked.append(1)
        connection.sendall(b"HTTP/1.1 307 Round\r\nLocation: /again\r\nContent-Length: 0\r\n\r\n")

    with answering(around) as url, pytest.raises(dstack.ProtocolError, match="redirects to /again"):
        get(kind, url)
    assert len(asked) == 1


@KINDS
@pytest.mark.parametrize(
    "asked", ["999999999999", "Fri, 31 Dec 9999 23:59:59 GMT", "-5", "1e400", "nan", "\x00"]
)
def test_the_wait_that_a_server_asks_for_is_bounded_by_the_budget(kind: str, asked: str) -> None:
    def busy(connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 429 Busy\r\nRetry-After: {asked}\r\nContent-Length: 0\r\n\r\n".encode())

    with answering(busy) as url:
        began = time.monotonic()
        with pytest.raises(dstack.DstackError):
            get(kind, url, retry_budget=0.5)
        assert time.monotonic() - began < PATIENCE


@KINDS
@pytest.mark.parametrize(
    "name", ["../../../escaped", "/tmp/escaped", "~/.ssh/authorized_keys", "a\x00b", "-oProxyCommand=x"]
)
def test_names_made_up_by_a_server_create_no_file(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "a" / "b" / "home"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    monkeypatch.chdir(home)
    run = run_json("running", run_id=name)
    run["run_spec"]["run_name"] = name
    run["run_spec"]["configuration"]["ports"] = [name]
    run["jobs"][0]["job_spec"]["job_name"] = name
    with answering(whole(json.dumps(run).encode())) as url:
        if kind == "sync":
            with dstack.Client(
                server_url=url, project_name="main", user_token=TOKEN, retry_budget=0.2
            ) as client:
                found = client.runs.get("train")
                assert found is not None
                for action in (lambda: list(found.logs()), found.events, found.refresh):
                    with suppress(dstack.DstackError):
                        action()
        else:
            get(kind, url)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "home"]


def frames_of(error: BaseException) -> list[str]:
    """Return every frame of an error and of its causes, with the local variables."""
    found: list[str] = []
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        left += [one.__cause__, one.__context__]
        for frame, line in traceback.walk_tb(one.__traceback__):
            if "/tests/" not in frame.f_code.co_filename:
                found.append(f"{frame.f_code.co_qualname}:{line} {frame.f_locals!r}")
        found.append(repr(one))
    return found


def refused(kind: str) -> dstack.DstackError:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return failure(kind, f"http://127.0.0.1:{taken.getsockname()[1]}")


def failure(kind: str, url: str, **arguments: Any) -> dstack.DstackError:
    with pytest.raises(dstack.DstackError) as caught:
        get(kind, url, **arguments)
    return caught.value


@KINDS
@pytest.mark.parametrize(
    "what", ["refused", "silent", "cut", "401", "half", "endless", "no head", "too slow", "too big"]
)
def test_no_frame_of_an_error_contains_the_token(
    kind: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def silent(_: socket.socket) -> None:
        over.wait(PATIENCE)

    answers: dict[str, Answer] = {
        "silent": silent,
        "cut": lambda _: None,
        "401": lambda connection: connection.sendall(
            b'HTTP/1.1 401 No\r\nContent-Length: 15\r\n\r\n{"detail": "x"}'
        ),
        "half": lambda connection: connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{"),
        "endless": ENDLESS["100 without end"](),
        "no head": ENDLESS["no HTTP at all"](),
        "too slow": ENDLESS["tiny chunks"](),
        "too big": whole(b" " * 2000),
    }
    monkeypatch.setattr("dstack_core._transport.settings.LARGEST_REPLY", 1000)
    if what == "refused":
        error = refused(kind)
    else:
        with answering(answers[what]) as url:
            error = failure(kind, url)
            over.set()
    frames = frames_of(error)
    assert any("dstack_core" in frame or "Client" in frame for frame in frames)
    assert not [frame for frame in frames if TOKEN in frame]
