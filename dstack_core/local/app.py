"""The routes of the embedded server as a Starlette application (PROTOCOL 1)."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from dstack_core.local import bodies, not_emulated, queries
from dstack_core.local.apply import apply, get_plan
from dstack_core.local.errors import (
    ApiError,
    ServerBugError,
    invalid,
    invalid_token,
    not_exists,
    unauthenticated,
)
from dstack_core.local.gpu_groups import gpu_groups
from dstack_core.local.metrics import MetricsQuery, job_metrics
from dstack_core.local.proxy import ServiceProxy
from dstack_core.local.request_body import read_body
from dstack_core.local.resource_routes import ResourceApi
from dstack_core.local.state import SERVER_VERSION, State
from dstack_core.local.uploads import receive_archive, receive_code
from dstack_core.local.versions import check_client_version
from dstack_core.local.volume_routes import VolumeApi

Handler = Callable[[Request], Awaitable[Any]]


class Api:
    """The endpoints of one server, one public method each."""

    def __init__(self, state: State) -> None:
        self.state = state

    def _authenticate(self, request: Request) -> None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise unauthenticated()
        if not secrets.compare_digest(token.strip().encode(), self.state.settings.token.encode()):
            raise invalid_token()

    def _route(self, path: str, handler: Handler, method: str = "POST", public: bool = False) -> Route:
        async def endpoint(request: Request) -> Response:
            check_client_version(request.headers.get("x-api-version"))
            if not public:
                self._authenticate(request)
            if "project" in request.path_params:
                self.state.require_project(request.path_params["project"])
            return JSONResponse(await handler(request))

        return Route(path, endpoint, methods=[method])

    def routes(self) -> list[Route]:
        """Return the routing table."""
        project = "/api/project/{project}"
        return [
            Route("/healthcheck", self.healthcheck, methods=["GET"]),
            self._route("/api/server/get_info", self.get_info, public=True),
            self._route("/api/users/get_my_user", self.get_my_user),
            self._route("/api/projects/list", self.list_projects),
            self._route("/api/projects/{project}/get", self.get_project),
            self._route(f"{project}/runs/get_plan", self.get_plan),
            self._route(f"{project}/runs/apply", self.apply),
            self._route(f"{project}/runs/get", self.get_run),
            self._route("/api/runs/list", self.list_runs),
            self._route(f"{project}/runs/stop", self.stop_runs),
            self._route(f"{project}/runs/delete", self.delete_runs),
            self._route(f"{project}/logs/poll", self.poll_logs),
            self._route("/api/events/list", self.list_events),
            self._route(f"{project}/metrics/job/{{run_name}}", self.job_metrics, method="GET"),
            self._route(f"{project}/repos/init", self.init_repo),
            self._route(f"{project}/repos/get", self.get_repo),
            self._route(f"{project}/repos/upload_code", self.upload_code),
            self._route("/api/files/upload_archive", self.upload_archive),
            self._route("/api/files/get_archive_by_hash", self.get_archive),
            self._route(f"{project}/repos/list", self.list_repos),
            self._route(f"{project}/repos/delete", self.delete_repos),
            self._route(f"{project}/gpus/list", self.list_gpus),
            *(self._route(path, handler) for path, handler in ResourceApi(self.state).endpoints()),
            *(self._route(path, handler) for path, handler in VolumeApi(self.state).endpoints()),
            *(self._route(path, handler) for path, handler in not_emulated.endpoints()),
            Route("/projects/{project}/runs/{run_id}", self.run_page, methods=["GET"]),
            *ServiceProxy(self.state).routes(),
            # Any other GET path gets a 404. Because this route matches every path, any other POST gets a 405.
            Route("/{path:path}", self.nothing, methods=["GET"]),
        ]

    async def healthcheck(self, request: Request) -> Response:
        """Report that the server is running."""
        return JSONResponse({"status": "running"})

    async def run_page(self, request: Request) -> Response:
        """Return a run as plain text, where the real server has a page; there is no login, so no secrets."""
        run = self.state.runs.get(request.path_params["run_id"])
        if run is None:
            raise HTTPException(404)
        shown = {
            key: run.wire()[key] for key in ("id", "status", "termination_reason", "submitted_at", "cost")
        }
        lines = [
            f"Run {run.name} on the embedded dstack server",
            "",
            *(f"{k}: {v}" for k, v in shown.items()),
        ]
        return PlainTextResponse("\n".join(lines) + "\n")

    async def nothing(self, request: Request) -> Response:
        """Answer an unknown path."""
        raise HTTPException(404)

    async def get_info(self, request: Request) -> Any:
        """Return the version of the server."""
        return {"server_version": SERVER_VERSION}

    async def get_my_user(self, request: Request) -> Any:
        """Return the user with its token and its SSH keys."""
        _, private = await self.state.keys.pair()
        token = self.state.settings.token
        return {**await self.state.user(), "creds": {"token": token}, "ssh_private_key": private}

    async def list_projects(self, request: Request) -> Any:
        """Return the one project."""
        projects = [await self.state.project(with_members=False)]
        asked = await request.body() and await read_body(request, bodies.ListProjectsRequest)
        counted = asked and asked.return_total_count
        return {"total_count": len(projects), "projects": projects} if counted else projects

    async def get_project(self, request: Request) -> Any:
        """Return the project with its members."""
        return await self.state.project(with_members=True)

    async def get_plan(self, request: Request) -> Any:
        """Return the plan of a run."""
        return await get_plan(self.state, await read_body(request, bodies.GetRunPlanRequest))

    async def apply(self, request: Request) -> Any:
        """Create or update a run."""
        return (await apply(self.state, await read_body(request, bodies.ApplyRunPlanRequest))).wire()

    async def get_run(self, request: Request) -> Any:
        """Return a run."""
        return queries.get_run(self.state, await read_body(request, bodies.GetRunRequest)).wire()

    async def list_runs(self, request: Request) -> Any:
        """Return a page of runs."""
        return queries.list_runs(self.state, await read_body(request, bodies.ListRunsRequest))

    async def stop_runs(self, request: Request) -> Any:
        """Send stop requests to runs."""
        queries.stop_runs(self.state, await read_body(request, bodies.StopRunsRequest))

    async def delete_runs(self, request: Request) -> Any:
        """Mark runs as deleted."""
        queries.delete_runs(self.state, await read_body(request, bodies.DeleteRunsRequest))

    async def poll_logs(self, request: Request) -> Any:
        """Return a page of log messages."""
        return self.state.logs.poll(await read_body(request, bodies.PollLogsRequest))

    async def list_events(self, request: Request) -> Any:
        """Return a page of events."""
        return self.state.events.page(await read_body(request, bodies.ListEventsRequest))

    async def job_metrics(self, request: Request) -> Any:
        """Return what a job has used of the machine."""
        try:
            asked = MetricsQuery.model_validate(dict(request.query_params))
        except ValidationError as error:
            raise invalid(
                error.errors(include_url=False, include_context=False, include_input=False)
            ) from error
        name = request.path_params["run_name"]
        run = self.state.named.get(name) if asked.run_id is None else self.state.runs.get(str(asked.run_id))
        wanted = (asked.replica_num, asked.job_num)
        jobs = run.jobs if run is not None and run.name == name else []
        job = next((one for one in jobs if (one.spec["replica_num"], one.spec["job_num"]) == wanted), None)
        if job is None:
            raise not_exists("Found no job with given parameters")
        machine = job.latest.provisioning_data
        resources = None if machine is None else machine["instance_type"]["resources"]
        return job_metrics(asked.chosen(self.state.metrics.points(job.latest.id)), resources)

    async def init_repo(self, request: Request) -> Any:
        """Store a repo."""
        repo = await read_body(request, bodies.SaveRepoCredsRequest)
        self.state.repos[repo.repo_id] = repo

    async def get_repo(self, request: Request) -> Any:
        """Return a repo."""
        asked = await read_body(request, bodies.GetRepoRequest)
        repo = self.state.repos.get(asked.repo_id)
        if repo is None:
            raise not_exists("Repo not found")
        found = repo.model_dump(mode="json")
        return found if asked.include_creds else {**found, "repo_creds": None}

    async def upload_code(self, request: Request) -> Any:
        """Store the code of a repo."""
        await receive_code(self.state, request)

    async def upload_archive(self, request: Request) -> Any:
        """Store a file archive."""
        return await receive_archive(self.state, request)

    async def get_archive(self, request: Request) -> Any:
        """Return the archive with a hash."""
        asked = await read_body(request, bodies.GetFileArchiveByHashRequest)
        for archive_id, (digest, _) in self.state.archives.items():
            if digest == asked.hash:
                return {"id": archive_id, "hash": digest}
        raise not_exists("File archive not found")

    async def list_repos(self, request: Request) -> Any:
        """Return the repos without their credentials."""
        repos = self.state.repos.values()
        return [repo.model_dump(mode="json", exclude={"repo_creds"}) for repo in repos]

    async def delete_repos(self, request: Request) -> Any:
        """Delete repos."""
        for repo_id in (await read_body(request, bodies.DeleteReposRequest)).repos_ids:
            self.state.repos.pop(repo_id, None)

    async def list_gpus(self, request: Request) -> Any:
        """Return the GPUs of the simulated machine."""
        asked = await read_body(request, bodies.ListGpusRequest)
        return {"gpus": gpu_groups(self.state.settings.inventory, asked), "cpus": None}


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)  # noqa: S101 - registered for this class only
    return JSONResponse({"detail": error.detail}, status_code=error.status)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class only
    return JSONResponse({"detail": error.detail}, status_code=error.status_code, headers=error.headers)


async def _server_bug(request: Request, error: Exception) -> Response:
    return PlainTextResponse("Internal Server Error", status_code=500, headers={"Connection": "close"})


def build_app(state: State) -> Starlette:
    """Return the application that serves a state."""
    return Starlette(
        routes=Api(state).routes(),
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ServerBugError: _server_bug,
        },
    )
