"""Every call the client makes, as data (PROTOCOL 1.2 to 1.9).

A call is a request, how to read its reply, whether it may be repeated, and the place that errors name.
Nothing here sends anything: a flow yields the call, a driver carries it out. One style of request serves all
supported servers: JSON, the token, no version header (PROTOCOL 1.1: a server would translate its replies for
an older client), and only keys that are set, since servers refuse unknown ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

from dstack_core._wire import logs
from dstack_core._wire.attach import Approach, parse_approach
from dstack_core._wire.code import Code, StoredRepo, Upload
from dstack_core._wire.http_messages import Call, NoneWhenMissing, Parse, Place, Reply, Request
from dstack_core._wire.plans import parse_plan
from dstack_core._wire.records import parse_events, parse_metrics, parse_project, parse_user
from dstack_core._wire.runs import RunSnapshot, parse_run
from dstack_core._wire.services import service_answers
from dstack_core._wire.smaller_gpu import SmallerGpu, smaller_gpu
from dstack_core._wire.updates import Resource, UpdatePlan, parse_resource, parse_update_plan
from dstack_core._wire.versions import Release, parse_release
from dstack_core.errors import RequestRejectedError, RunNotFoundError
from dstack_core.models.account import Project, User
from dstack_core.models.plan import Plan
from dstack_core.models.records import EventRecord, Metric
from dstack_core.models.utilization import Utilization

T = TypeVar("T")
# Runs and events a page: the server's own limit (PROTOCOL 1.7). Whether a page is full decides if there is
# another one, so a number above the limit would end a list after its first page.
PAGE_SIZE = 100


@dataclass(frozen=True, slots=True)
class UserKey:
    """The user and key a run is submitted with; only servers from 0.19.33 on have a ``public_key``."""

    name: str
    public_key: str | None


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A server's version in its own words, and the ``Date`` header of its reply; None where it sent none."""

    version: str | None
    date: str | None


@dataclass(frozen=True, slots=True)
class Api:
    """The calls for one project of one server; ``server_url`` has no slash at its end.

    ``ui_url`` is the address at which browsers reach the server, by default the same.
    """

    server_url: str
    project: str
    ui_url: str = ""

    def __post_init__(self) -> None:
        if not self.ui_url:
            object.__setattr__(self, "ui_url", self.server_url)

    def run_url(self, run_id: str) -> str:
        """Return the address of a run's page in the server's UI."""
        return f"{self.ui_url}/projects/{quote(self.project)}/runs/{run_id}"

    def fleet_url(self, fleet_id: str) -> str:
        """Return the address of a fleet's page in the server's UI."""
        return f"{self.ui_url}/projects/{quote(self.project)}/fleets/{fleet_id}"

    def runs_url(self) -> str:
        """Return the address of the list of runs in the server's UI."""
        return f"{self.ui_url}/runs"

    def browser_url(self, url: str) -> str:
        """Return an address of the server as browsers reach it; any other address as it is."""
        rest = url.removeprefix(self.server_url)
        return f"{self.ui_url}{rest}" if rest != url and rest[:1] in ("", "/") else url

    def get_release(self) -> Call[Release | None]:
        """Ask for the server's version; None where it is unknown (PROTOCOL 1.1: 404 before 0.18.14)."""
        call = self.call("/api/server/get_info", {}, lambda data: parse_release(data["server_version"]))

        def none_when_missing(reply: Reply) -> Release | None:
            return None if reply.status in (404, 405) else call.parse(reply)

        return Call(call.request, none_when_missing, place=call.place)

    def get_info(self) -> Call[ServerInfo]:
        """Ask for what a server reports of itself (PROTOCOL 1.1)."""
        call = self.call("/api/server/get_info", {}, lambda data: data["server_version"])

        def parse(reply: Reply) -> ServerInfo:
            version = None if reply.status in (404, 405) else call.parse(reply)
            return ServerInfo(version, reply.headers.get("date"))

        return Call(call.request, parse, place=call.place)

    def get_user_key(self, run_name: str | None = None) -> Call[UserKey]:
        """Ask for the key of the token's user; ``run_name`` is the run that errors name."""
        return self.call(
            "/api/users/get_my_user",
            {},
            lambda data: UserKey(data["username"], data.get("ssh_public_key")),
            run_name=run_name,
        )

    def get_user(self) -> Call[User]:
        """Ask for the user the token belongs to (PROTOCOL 1.2)."""
        return self.call("/api/users/get_my_user", {}, parse_user)

    def list_projects(self) -> Call[list[Project]]:
        """Ask for the projects the user sees (PROTOCOL 1.2)."""
        return self.call("/api/projects/list", {}, lambda data: [parse_project(item) for item in data])

    def get_project(self, name: str) -> Call[Project]:
        """Ask for one project with its members and backends (PROTOCOL 1.2)."""
        path = f"/api/projects/{quote(name, safe='')}/get"
        return replace(self, project=name).call(path, {}, parse_project)

    def list_events(self, run_id: str, *, limit: int, after: EventRecord | None) -> Call[list[EventRecord]]:
        """Ask for one page of a run's events, newest first (PROTOCOL 1.9)."""
        body: dict[str, Any] = {"within_runs": [run_id], "limit": limit}
        if after is not None:
            body |= {"prev_recorded_at": after.recorded_at.isoformat(), "prev_id": after.id}
        return self.call("/api/events/list", body, parse_events)

    def get_metrics(
        self,
        name: str,
        run_id: str,
        *,
        node: int,
        replica: int,
        limit: int,
        after: datetime | None = None,
    ) -> Call[list[Metric]]:
        """Ask for the newest values of a job's metrics, only those later than ``after`` (PROTOCOL 1.9)."""
        # Servers before 0.19.34 do not know run_id and pass it over.
        query: dict[str, Any] = {"run_id": run_id, "replica_num": replica, "job_num": node, "limit": limit}
        if after is not None:
            # The server counts from this very value on, and leaves it out: a CPU needs a value before.
            query["after"] = after.isoformat()
        path = self.path(f"metrics/job/{quote(name, safe='')}?{urlencode(query)}")
        read = partial(parse_metrics, node=node, replica=replica)
        call = self.call(path, None, read, run_name=name, request=Request("GET", path))

        def name_the_job(reply: Reply) -> list[Metric]:
            try:
                return call.parse(reply)
            except RunNotFoundError:
                raise RunNotFoundError(f"{call.place} has no node {node} in replica {replica}") from None

        return Call(call.request, name_the_job, place=call.place)

    def ask_service(self, url: str, method: str) -> Call[bool | None]:
        """Ask a service's address whether it answers; None when only another method can find out.

        The token goes to the server itself, and to another host only over https.
        """
        # Without a gateway the service lies behind the server's own address (PROTOCOL 1.9).
        own = url.startswith(f"{self.server_url}/")
        request = Request(method, url, anonymous=not own and not url.startswith("https://"))
        place = Place(self.server_url, self.project)
        return Call(request, lambda reply: service_answers(reply, method), idempotent=False, place=str(place))

    def absolute(self, url: str) -> str:
        """Return the whole address for one that a server may give relative to its own (PROTOCOL 1.9)."""
        return f"{self.server_url}{url}" if url.startswith("/") else url

    def get_run(self, name: str, run_id: str | None = None) -> Call[RunSnapshot | None]:
        """Ask for a run by id when it is known (deleted ones too), else by name; None when missing."""
        key = {"id": run_id} if run_id else {"run_name": name}
        call = self.call(self.path("runs/get"), key, parse_run, run_name=name)
        return Call(call.request, NoneWhenMissing(call.parse), place=call.place)

    def get_approach(self, name: str, run_id: str, node: int) -> Call[Approach]:
        """Ask how the container of a run's node is reached; ``RunNotFoundError`` when the run is gone."""
        return self.call(
            self.path("runs/get"), {"id": run_id}, lambda data: parse_approach(data, node), run_name=name
        )

    def get_private_key(self, run_name: str) -> Call[str | None]:
        """Ask for the user's private key in PEM; only servers from 0.19.33 on have one (PROTOCOL 1.2)."""
        return self.call(
            "/api/users/get_my_user", {}, lambda data: data.get("ssh_private_key"), run_name=run_name
        )

    def list_runs(self, *, only_active: bool, after: RunSnapshot | None = None) -> Call[list[RunSnapshot]]:
        """Ask for one page of up to 100 runs, newest first, deleted ones included (PROTOCOL 1.7)."""
        body: dict[str, Any] = {"project_name": self.project, "only_active": only_active, "limit": PAGE_SIZE}
        if after is not None:
            body |= {"prev_submitted_at": after.submitted_at, "prev_run_id": after.id}
        return self.call("/api/runs/list", body, lambda data: [parse_run(item) for item in data])

    def get_plan(self, run_spec: Mapping[str, Any], **more: Any) -> Call[Plan]:
        """Ask which offers a run would have; nothing is submitted. ``more`` are further keys."""
        return self.call(self.path("runs/get_plan"), {"run_spec": run_spec, **more}, parse_plan)

    def delete_run(self, name: str) -> Call[None]:
        """Ask to delete a run that has ended; an active one is refused (PROTOCOL 1.7)."""
        return self.call(self.path("runs/delete"), {"runs_names": [name]}, lambda _: None, run_name=name)

    def get_usage_spec(self, name: str, run_id: str, usage: Utilization) -> Call[SmallerGpu | None]:
        """Ask for a run and return what it would need of a smaller GPU; None if it needs its own."""
        return self.call(
            self.path("runs/get"), {"id": run_id}, lambda data: smaller_gpu(data, usage), run_name=name
        )

    def apply(self, run_spec: Mapping[str, Any]) -> Call[RunSnapshot]:
        """Submit a run; never forces, never names a current resource (PROTOCOL 1.4)."""
        # So a server refuses it while a run of that name is active. Repeated after the run has finished, it
        # would create a second one, hence not idempotent.
        body = {"plan": {"run_spec": run_spec}, "force": False}
        run_name = run_spec.get("run_name")
        return self.call(self.path("runs/apply"), body, parse_run, run_name=run_name, idempotent=False)

    def get_resource(self, name: str) -> Call[Resource | None]:
        """Ask for a run by name as an update needs it; None when missing."""
        call = self.call(self.path("runs/get"), {"run_name": name}, parse_resource, run_name=name)
        return Call(call.request, NoneWhenMissing(call.parse), place=call.place)

    def get_update_plan(self, run_spec: Mapping[str, Any]) -> Call[UpdatePlan]:
        """Ask what an apply would change of the run of that name; nothing is changed."""
        name = run_spec.get("run_name")
        return self.call(self.path("runs/get_plan"), {"run_spec": run_spec}, parse_update_plan, run_name=name)

    def update(self, run_spec: Mapping[str, Any], current: Resource) -> Call[RunSnapshot]:
        """Update a run in place; refused if it is no longer ``current`` (PROTOCOL 1.4)."""
        body = {"plan": {"run_spec": run_spec, "current_resource": current.data}, "force": False}
        name = run_spec.get("run_name")
        return self.call(self.path("runs/apply"), body, parse_run, run_name=name, idempotent=False)

    def stop(self, name: str, *, abort: bool) -> Call[None]:
        """Ask to stop a run; unknown and finished names are fine (PROTOCOL 1.7)."""
        # ``abort`` has no default: without it the server refuses the request.
        body = {"runs_names": [name], "abort": abort}
        return self.call(self.path("runs/stop"), body, lambda _: None, run_name=name)

    def poll_logs(
        self,
        name: str,
        submission_id: str,
        *,
        start_time: str | None,
        token: str | None = None,
        diagnose: bool = False,
    ) -> Call[logs.LogPage]:
        """Ask for one page of a job submission's log (PROTOCOL 1.8)."""
        body: dict[str, Any] = {"run_name": name, "job_submission_id": submission_id, "limit": logs.PAGE_SIZE}
        # Servers before 0.19.16 refuse the key of the token, so it is sent only to one that sent a token.
        optional = {"start_time": start_time, "next_token": token, "diagnose": diagnose or None}
        body |= {key: value for key, value in optional.items() if value is not None}
        return self.call(self.path("logs/poll"), body, logs.parse_page, run_name=name)

    def init_repo(self, code: Code, release: Release | None = None) -> Call[None]:
        """Make a repo and its credentials known to the project; idempotent (PROTOCOL 1.3)."""
        body = code.init_body(release)
        return self.call(self.path("repos/init"), body, lambda _: None)

    def find_repo(self, repo_id: str) -> Call[StoredRepo | None]:
        """Ask what the project has for a repo; None when it is unknown (PROTOCOL 1.3)."""
        body = {"repo_id": repo_id, "include_creds": True}
        return none_when_missing(self.call(self.path("repos/get"), body, StoredRepo.parse))

    def upload_code(self, repo_id: str, upload: Upload) -> Call[None]:
        """Upload a repo's archive or diff under its hash (PROTOCOL 1.3)."""
        path = self.path(f"repos/upload_code?repo_id={quote(repo_id)}")
        request = Request.upload(path, upload.sha256, upload.data)
        return self.call(path, None, lambda _: None, request=request)

    def find_archive(self, sha256: str) -> Call[str | None]:
        """Ask for the id of an uploaded file archive; None when it is missing (PROTOCOL 1.3)."""
        return none_when_missing(
            self.call("/api/files/get_archive_by_hash", {"hash": sha256}, lambda data: str(data["id"]))
        )

    def upload_archive(self, upload: Upload) -> Call[str]:
        """Upload a file archive under its hash and return its id (PROTOCOL 1.3)."""
        path = "/api/files/upload_archive"
        request = Request.upload(path, upload.sha256, upload.data)
        return self.call(path, None, lambda data: str(data["id"]), request=request)

    def path(self, rest: str) -> str:
        """Return the path of a call for the project."""
        return f"/api/project/{quote(self.project, safe='')}/{rest}"

    def call(
        self,
        path: str,
        body: Any,
        read: Callable[[Any], T],
        *,
        run_name: str | None = None,
        idempotent: bool = True,
        request: Request | None = None,
    ) -> Call[T]:
        """Return a call whose reply is read by ``read``."""
        place = Place(self.server_url, self.project, run_name)
        return Call(request or Request.post(path, body), Parse(place, path, read), idempotent, str(place))


def none_when_missing(call: Call[T]) -> Call[T | None]:
    """Return the call with None for what the project does not have."""

    def parse(reply: Reply) -> T | None:
        try:
            return call.parse(reply)
        except RequestRejectedError as error:
            if error.code == "resource_not_exists":
                return None
            raise

    return Call(call.request, parse, place=call.place)
