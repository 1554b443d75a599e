"""The host agent (shim): the API through which the server starts and removes containers (PROTOCOL 5.2)."""

from __future__ import annotations

import threading
import time
from collections import ChainMap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paramiko
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.rig.http_loop import HttpLoop, Listener
from tests.rig.runner import Runner
from tests.rig.ssh_host import SshHost
from tests.rig.ssh_listener import SshListener, key_blob
from tests.rig.workspace import Workspace

RUNNER_PORT = 10999
CONTAINER_SSH_PORT = 10022
# Seconds. The server removes listed tasks that are not in its own record of the host, which may be older than the
# task: a new run would lose its container and fail as unreachable two minutes later. So a new task is listed late.
_UNLISTED_SECONDS = 30.0


@dataclass(frozen=True)
class Container:
    """Settings of every container: mapped ports, and folders before those of its PATH.

    Both may be changed at any time, and apply to later connections and jobs.
    """

    routes: dict[int, int] = field(default_factory=dict)
    path: list[Path] = field(default_factory=list)


@dataclass
class _Task:
    runner: Runner
    listener: Listener
    ssh: SshHost
    workspace: Workspace
    created: float = field(default_factory=time.monotonic)
    status: str = "running"
    reason: str = ""
    message: str = ""

    def describe(self, name: str) -> dict[str, Any]:
        ports = {RUNNER_PORT: self.listener.port, CONTAINER_SSH_PORT: self.ssh.port}
        return {
            "id": name,
            "status": self.status,
            "termination_reason": self.reason,
            "termination_message": self.message,
            "ports": [{"container": inside, "host": outside} for inside, outside in ports.items()],
        }


class Shim:
    """A host agent that simulates one container per task: a runner, and an SSH daemon for the job's ports."""

    def __init__(
        self,
        host: SshHost,
        host_key: paramiko.PKey,
        http: HttpLoop,
        folder: Path,
        version: str,
        container: Container,
    ) -> None:
        self._host = host
        self._container = container
        self._host_key = host_key
        self._http = http
        self._folder = folder
        self._version = version
        self._lock = threading.Lock()
        self._tasks: dict[str, _Task] = {}
        self.app = Starlette(
            routes=[
                Route("/api/healthcheck", self._healthcheck),
                Route("/api/instance/health", self._nothing),
                Route("/api/instance/info", self._nothing),
                Route("/api/components", self._components),
                Route("/api/tasks", self._list),
                Route("/api/tasks", self._create, methods=["POST"]),
                Route("/api/tasks/{id}", self._get),
                Route("/api/tasks/{id}/terminate", self._terminate, methods=["POST"]),
                Route("/api/tasks/{id}/remove", self._remove, methods=["POST"]),
            ]
        )

    def healthcheck(self) -> dict[str, str]:
        """Return how this agent describes itself."""
        return {"service": "dstack-shim", "version": self._version}

    def listeners(self) -> list[SshListener]:
        """List the SSH daemons of the containers."""
        with self._lock:
            return [task.ssh for task in self._tasks.values()]

    def close(self) -> None:
        """Kill and remove every task."""
        with self._lock:
            tasks = list(self._tasks.values())
            self._tasks.clear()
        for task in tasks:
            task.runner.kill()
            self._dispose(task)

    def _healthcheck(self, request: Request) -> Response:
        return JSONResponse(self.healthcheck())

    def _nothing(self, request: Request) -> Response:
        return JSONResponse({})

    def _components(self, request: Request) -> Response:
        # Report exactly the version of the server, so that it has nothing to install.
        names = ("dstack-runner", "dstack-shim")
        known = [{"name": name, "version": self._version, "status": "installed"} for name in names]
        return JSONResponse({"components": known})

    def _list(self, request: Request) -> Response:
        latest = time.monotonic() - _UNLISTED_SECONDS
        with self._lock:
            settled = {name: task for name, task in self._tasks.items() if task.created < latest}
        tasks = [{"id": name, "status": task.status} for name, task in settled.items()]
        return JSONResponse({"ids": [task["id"] for task in tasks], "tasks": tasks})

    async def _create(self, request: Request) -> Response:
        return await run_in_threadpool(self._start, await request.json())

    def _start(self, wanted: dict[str, Any]) -> Response:
        with self._lock:
            if wanted["id"] in self._tasks:
                return Response("the task exists", status_code=409)
            workspace = Workspace(self._folder / wanted["id"], self._container.path)
            runner = Runner(workspace, self._version)
            listener = self._http.serve(runner.app)
            # Inside the container the runner listens on its well-known port.
            ssh = SshHost(
                self._host_key,
                execute=runner.execute,
                routes=ChainMap({RUNNER_PORT: listener.port}, self._container.routes),
            )
            # Users' keys are those that may also log in on the host; the other ones are the server's.
            users = {key_blob(line) for line in wanted.get("host_ssh_keys") or []}
            ssh.client_keys |= users
            ssh.server_keys.update(key_blob(line) for line in wanted.get("container_ssh_keys") or [])
            self._host.client_keys |= users
            self._tasks[wanted["id"]] = _Task(runner, listener, ssh, workspace)
        return Response()

    def _get(self, request: Request) -> Response:
        name = request.path_params["id"]
        task = self._tasks.get(name)
        return JSONResponse(task.describe(name)) if task is not None else Response(status_code=404)

    async def _terminate(self, request: Request) -> Response:
        task = self._tasks.get(request.path_params["id"])
        if task is None:
            return Response(status_code=404)
        order = await request.json()
        await run_in_threadpool(self._end, task, order)
        return Response()

    def _end(self, task: _Task, order: dict[str, Any]) -> None:
        if order.get("timeout"):
            task.runner.stop(float(order["timeout"]))
        else:
            task.runner.kill()
        task.status = "terminated"
        task.reason = order.get("termination_reason") or ""
        task.message = order.get("termination_message") or ""

    async def _remove(self, request: Request) -> Response:
        task = self._tasks.get(request.path_params["id"])
        if task is None:
            return Response(status_code=404)
        if task.status != "terminated":
            return Response("the task is not terminated", status_code=409)
        with self._lock:
            self._tasks.pop(request.path_params["id"], None)
        await run_in_threadpool(self._dispose, task)
        return Response()

    def _dispose(self, task: _Task) -> None:
        task.listener.close()
        task.ssh.close()
        task.workspace.remove()
