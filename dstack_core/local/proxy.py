"""The in-server proxy of services: requests to a run's address go to its port (PROTOCOL 1.9)."""

from __future__ import annotations

import asyncio
import secrets

import urllib3
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from dstack_core.local.runs import Run
from dstack_core.local.specs import ServiceConfiguration
from dstack_core.local.state import State
from dstack_core.local.workspace import ADDRESS

_METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"]
_PATH = "/proxy/services/{project}/{run_name}"
# Headers of the connection, not of the message; the server writes its own.
_DROPPED = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "upgrade", "server", "date", "content-length"}
)
# A port of this machine accepts or refuses at once, so 5 s are only for a busy machine. A model may take
# a long time to answer; after a minute the client gets a 504.
_CONNECT_SECONDS = 5.0
_READ_SECONDS = 60.0


class ServiceProxy:
    """The proxy of one server's services; it reads a whole reply before passing it on."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._pool = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=_READ_SECONDS), retries=False
        )

    def routes(self) -> list[Route]:
        """Return the routes of all services."""
        return [
            Route(_PATH, self._to_root, methods=_METHODS),
            Route(_PATH + "/{path:path}", self._pass_on, methods=_METHODS),
        ]

    async def _to_root(self, request: Request) -> Response:
        return RedirectResponse(request.url.replace(path=request.url.path + "/"), 308)

    async def _pass_on(self, request: Request) -> Response:
        project, name = request.path_params["project"], request.path_params["run_name"]
        run = self._state.named.get(name) if project == self._state.settings.project else None
        if run is None or not _ready(run):
            raise HTTPException(404, f"Service {project}/{name} not found")
        service = run.spec.configuration
        assert isinstance(service, ServiceConfiguration)  # noqa: S101 - _ready() has checked it
        if service.auth and not self._is_member(request):
            raise HTTPException(403, f"Unauthenticated or unauthorized to access project {project}")
        path = request.scope["raw_path"].decode()
        if service.strip_prefix:
            path = "/" + path.split("/", 5)[5]
        if request.url.query:
            path += f"?{request.url.query}"
        url = f"http://{ADDRESS}:{service.port.container_port}{path}"
        body = await request.body()
        return await asyncio.to_thread(self._ask, request.method, url, request.headers, body)

    def _is_member(self, request: Request) -> bool:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        expected = self._state.settings.token
        return scheme.lower() == "bearer" and secrets.compare_digest(
            token.strip().encode(), expected.encode()
        )

    def _ask(self, method: str, url: str, headers: Headers, body: bytes) -> Response:
        kept = {name: value for name, value in headers.items() if name not in _DROPPED}
        try:
            reply = self._pool.request(
                method, url, body=body or None, headers=kept, redirect=False, decode_content=False
            )
        except urllib3.exceptions.ReadTimeoutError:
            raise HTTPException(504, "Timed out requesting upstream") from None
        except urllib3.exceptions.HTTPError:
            raise HTTPException(502, "Error requesting upstream") from None
        response = Response(reply.data, reply.status)
        for name in reply.headers:
            if name.lower() not in _DROPPED or (method == "HEAD" and name.lower() == "content-length"):
                # Repeated headers become one header, even several cookies, as in the real proxy.
                response.headers[name] = reply.headers[name]
        return response


def _ready(run: Run) -> bool:
    running = any(job.latest.status == "running" for job in run.jobs)
    return running and not run.finished and isinstance(run.spec.configuration, ServiceConfiguration)
