"""The tab "Utilization" on the page of a task: a chart of how busy the machine of its dstack run was.

The problem: Airflow mounts the application of a plugin beside its own, without a login of its own, and
nothing here may show what a user may not see.

The idea: this application has no data. Its page is static, and reads the task's XCom through Airflow's REST
API with the session of the user who opens it, so Airflow decides who may. What it got it sends here, and
gets it back as a chart, which is a function of the request alone. No connection, no token and no database are
used.

Source: Airflow documentation, "Plugins", ``fastapi_apps`` and ``external_views`` (Airflow 3.1 and later).
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from importlib.resources import files
from typing import Any

from airflow.plugins_manager import AirflowPlugin

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_PREFIX = "/dstack-utilization"
# An XCom has 60 points, some 4 kB. Without a limit, anybody who reaches the server could keep it busy.
_MOST_BYTES = 64 * 1024
_PAGES = {
    "": ("utilization.html", "text/html; charset=utf-8"),
    "/utilization.css": ("utilization.css", "text/css; charset=utf-8"),
    "/utilization.js": ("utilization.js", "text/javascript; charset=utf-8"),
}
_SAFE = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)


class UtilizationApp:
    """The page and its chart as an ASGI application."""

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request; anything but HTTP is left alone."""
        if scope["type"] != "http":
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
        if path == "/chart" and scope["method"] == "POST":
            await self._chart(receive, send)
        elif path in _PAGES and scope["method"] in ("GET", "HEAD"):
            name, kind = _PAGES[path]
            page = files("airflow_provider_dstack").joinpath("static", name).read_bytes()
            await _reply(send, 200, kind, b"" if scope["method"] == "HEAD" else page)
        else:
            await _reply(send, 404, "text/plain", b"Not found")

    async def _chart(self, receive: Receive, send: Send) -> None:
        from dstack_core.integration import utilization_chart

        body, more = b"", True
        while more and len(body) <= _MOST_BYTES:
            message = await receive()
            body, more = body + message.get("body", b""), bool(message.get("more_body"))
        try:
            if more or len(body) > _MOST_BYTES:
                raise ValueError("too large")
            shown = utilization_chart(json.loads(body))
        except (ValueError, RecursionError):
            await _reply(send, 422, "text/plain", b"Not the utilization of a run")
            return
        await _reply(send, 200, "application/json", json.dumps(shown).encode())


async def _reply(send: Send, status: int, kind: str, body: bytes) -> None:
    headers = {
        "content-type": kind,
        "content-length": str(len(body)),
        "content-security-policy": _SAFE,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


class DstackUtilizationPlugin(AirflowPlugin):
    """The plugin that Airflow loads; its tab is on the page of every task."""

    name = "dstack_utilization"
    fastapi_apps = [{"app": UtilizationApp(), "url_prefix": _PREFIX, "name": "dstack utilization"}]  # noqa: RUF012
    external_views = [  # noqa: RUF012
        {
            "name": "Utilization",
            # Relative, as Airflow may be served below a path.
            "href": f"{_PREFIX.lstrip('/')}/?dag_id={{DAG_ID}}&run_id={{RUN_ID}}&task_id={{TASK_ID}}"
            "&map_index={MAP_INDEX}",
            "destination": "task_instance",
            "url_route": "dstack-utilization",
        }
    ]
