"""The live log of a job as a websocket (PROTOCOL 4.6)."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import datetime

from starlette.websockets import WebSocket, WebSocketDisconnect

from tests.rig.journal import Journal


class LogsWebsocket:
    """A websocket with the raw output of a job from its beginning, in binary frames; it closes after the end.

    `start_time` (RFC 3339) leaves out older output; a fraction of a second is ignored.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    async def serve(self, websocket: WebSocket) -> None:
        """Serve one client; frames that it sends are ignored."""
        try:
            after = _milliseconds(websocket.query_params.get("start_time"))
        except ValueError:
            await websocket.close()
            return
        await websocket.accept()
        sender = asyncio.create_task(self._send(websocket, after))
        reader = asyncio.create_task(_ignore(websocket))
        try:
            await asyncio.wait({sender, reader}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sender, reader):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, WebSocketDisconnect, RuntimeError):
                    await task

    async def _send(self, websocket: WebSocket, after: int) -> None:
        loop = asyncio.get_running_loop()
        news = asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                loop.call_soon_threadsafe(news.set)

        position = 0
        with self._journal.watched(tell):
            while True:
                news.clear()
                position, chunks, over = self._journal.output(position, after)
                for chunk in chunks:
                    await websocket.send_bytes(chunk)
                if over:
                    await websocket.close()
                    return
                await news.wait()


def _milliseconds(start_time: str | None) -> int:
    return int(datetime.fromisoformat(start_time).timestamp()) * 1000 if start_time else 0


async def _ignore(websocket: WebSocket) -> None:
    while (await websocket.receive())["type"] != "websocket.disconnect":
        pass
