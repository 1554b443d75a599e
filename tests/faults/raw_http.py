"""HTTP as bytes: h11 parses requests, and replies are written by hand."""

from __future__ import annotations

import asyncio

import h11


async def next_request(
    connection: h11.Connection, reader: asyncio.StreamReader
) -> tuple[h11.Request, bytes] | None:
    request: h11.Request | None = None
    body = b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert request is not None
            return request, body
        else:
            return None


def endpoint(target: str) -> str:
    return "/".join(target.partition("?")[0].split("/")[-2:])


def head(status: int, body: bytes, close: bool, headers: tuple[tuple[str, str], ...] = ()) -> bytes:
    lines = [f"HTTP/1.1 {status} -", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers]
    if not any(name == "content-type" for name, _ in headers):
        lines.append("content-type: application/json")
    if close:
        lines.append("connection: close")
    return "\r\n".join([*lines, "", ""]).encode()


async def write(writer: asyncio.StreamWriter, *parts: bytes) -> None:
    writer.write(b"".join(parts))
    await writer.drain()
