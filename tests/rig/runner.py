"""The job agent (runner): the API through which the server starts, watches and stops one job (PROTOCOL 5.2)."""

from __future__ import annotations

import subprocess
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute

from tests.rig import processes
from tests.rig.command import UnsafeCommandError, without_preamble
from tests.rig.job import Job
from tests.rig.job_variables import job_variables
from tests.rig.journal import Journal
from tests.rig.logs_ws import LogsWebsocket
from tests.rig.workspace import Workspace

_REPO_DIRECTORY = "/workflow"
_FIRST_IN_IMAGE_DIRECTORY = (0, 19, 27)


class Runner:
    """The agent of one job, from its submission to its last log line; `app` is its HTTP API."""

    def __init__(self, workspace: Workspace, version: str) -> None:
        self._workspace = workspace
        self._version = version
        self._release = tuple(int(part) for part in version.split("."))
        self._journal = Journal()
        self._job = Job(self._journal, workspace.folder)
        self._submission: dict[str, Any] = {}
        self._archives: dict[str, bytes] = {}
        self._code: bytes | None = None
        self._place: tuple[dict[str, str], Path] | None = None
        self.app = Starlette(
            routes=[
                Route("/api/healthcheck", self._healthcheck),
                Route("/api/submit", self._submit, methods=["POST"]),
                Route("/api/upload_archive", self._upload_archive, methods=["POST"]),
                Route("/api/upload_code", self._upload_code, methods=["POST"]),
                Route("/api/run", self._run, methods=["POST"]),
                Route("/api/pull", self._pull),
                Route("/api/stop", self._stop, methods=["POST"]),
                Route("/api/metrics", self._metrics),
                WebSocketRoute("/logs_ws", LogsWebsocket(self._journal).serve),
            ]
        )

    def kill(self) -> None:
        """Kill the processes of the job."""
        self._job.kill()

    def stop(self, grace: float) -> None:
        """Interrupt the job and kill it after the grace (seconds)."""
        self._job.stop(grace=grace)

    def execute(self, command: str) -> bytes:
        """Run a command beside the job, in its environment; return its output."""
        if self._place is None:
            return b""
        variables, directory = self._place
        return subprocess.run(
            ["/bin/sh", "-c", command],
            env=variables,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        ).stdout

    def _healthcheck(self, request: Request) -> Response:
        return JSONResponse({"service": "dstack-runner", "version": self._version})

    async def _submit(self, request: Request) -> Response:
        # The real runner does the same, even for a server that was restarted and does not know the job's state.
        if self._submission:
            return Response("the job was submitted before", status_code=409)
        self._submission = await request.json()
        return Response()

    async def _upload_archive(self, request: Request) -> Response:
        async with request.form() as form:
            archive = form["archive"]
            if not isinstance(archive, UploadFile) or archive.filename is None:
                return Response("the archive is missing", status_code=400)
            self._archives[archive.filename] = await archive.read()
        return Response()

    async def _upload_code(self, request: Request) -> Response:
        self._code = await request.body()
        return Response()

    async def _run(self, request: Request) -> Response:
        spec = self._submission["job_spec"]
        directory = self._directory(spec)
        # A clone may take longer than the server waits for this reply.
        threading.Thread(target=self._start, daemon=True).start()
        user = (spec.get("user") or {}).get("username")
        return JSONResponse({"working_dir": str(directory), "username": user or "root"})

    def _pull(self, request: Request) -> Response:
        return JSONResponse(self._journal.pull(int(request.query_params.get("timestamp", 0))))

    async def _stop(self, request: Request) -> Response:
        await run_in_threadpool(self._job.stop)
        return Response()

    def _metrics(self, request: Request) -> Response:
        members = processes.in_session(self._job.pid) if self._job.pid is not None else []
        memory = sum(info.memory_bytes for info in members)
        return JSONResponse(
            {
                "timestamp_micro": time.time_ns() // 1000,
                "cpu_usage_micro": int(sum(info.cpu_seconds for info in members) * 1_000_000),
                "memory_usage_bytes": memory,
                "memory_working_set_bytes": memory,
                "gpus": [],
            }
        )

    def _directory(self, spec: dict[str, Any]) -> Path:
        """Return where the commands start; a relative path counts from the repo (PROTOCOL 2.4.5)."""
        wanted = spec.get("working_dir")
        if wanted is None and self._release >= _FIRST_IN_IMAGE_DIRECTORY:
            return self._workspace.resolve(None)
        return self._workspace.resolve(wanted, self._workspace.resolve(_REPO_DIRECTORY))

    def _start(self) -> None:
        try:
            self._prepare_and_start()
        except (
            OSError,
            ValueError,
            tarfile.TarError,
            subprocess.SubprocessError,
            UnsafeCommandError,
        ) as error:
            details = getattr(error, "stderr", None) or b""
            self._job.fail("executor_error", f"{error} {details.decode(errors='replace')}".strip())

    def _prepare_and_start(self) -> None:
        spec = self._submission["job_spec"]
        run_spec = (self._submission.get("run") or {}).get("run_spec") or self._submission["run_spec"]
        configuration = run_spec.get("configuration") or {}
        directory = self._directory(spec)
        repo_directory = self._workspace.resolve(spec.get("repo_dir") or _REPO_DIRECTORY, directory)
        repo = spec.get("repo_data") or run_spec.get("repo_data") or {}
        credentials = self._submission.get("repo_credentials") or {}
        self._workspace.place_code(repo, self._code, credentials, repo_directory)
        for archive in spec.get("file_archives") or []:
            target = self._workspace.resolve(archive["path"], directory)
            self._workspace.place_archive(self._archives[archive["id"]], target)
        directory.mkdir(parents=True, exist_ok=True)
        variables = job_variables(self._submission, self._workspace.home / ".mpi_hosts")
        default_image = not (configuration.get("image") or configuration.get("docker"))
        environment = self._workspace.environment({**variables, **(spec.get("env") or {})})
        self._place = environment, directory
        self._job.start(
            without_preamble(spec["commands"], default_image=default_image),
            environment,
            directory,
            spec.get("max_duration"),
        )
