"""Answer requests for one run each out of a page of ``runs/list`` (PROTOCOL 1.7)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from dstack_core._wire.plain import Call, Reply, Request
from dstack_core._wire.refusals import Place, raise_for_refusal
from dstack_core.errors import ProtocolError

PAGE_SIZE = 100
_PREFIX, _SUFFIX = "/api/project/", "/runs/get"
_PATH = "/api/runs/list"


@dataclass(frozen=True, slots=True)
class Lookup:
    """Say which run a request asks for: ``key`` is ``id`` or ``run_name``, ``value`` the run's."""

    project: str
    key: str
    value: str


@dataclass(frozen=True, slots=True)
class RunReply(Reply):
    """Be the reply to a lookup, made of an item of a page: it is read already."""

    data: Any = field(default=None, repr=False)

    def json(self) -> Any:
        """Return the run object."""
        return self.data


@dataclass(frozen=True, slots=True)
class ActivePage:
    """Hold one page of active runs; ``position`` is where the next one begins, None on the last page."""

    runs: Mapping[tuple[str, str], Reply]
    position: Mapping[str, Any] | None

    def answer(self, lookup: Lookup) -> Reply | None:
        """Return the reply to a lookup, or None when the run is not on this page."""
        return self.runs.get((lookup.key, lookup.value))


def lookup_of(request: Request) -> Lookup | None:
    """Return what a request looks up, or None when it is for something else."""
    path = request.path
    if request.body is None or not (path.startswith(_PREFIX) and path.endswith(_SUFFIX)):
        return None
    body = json.loads(request.body)
    key = "id" if body.get("id") else "run_name"
    return Lookup(unquote(path[len(_PREFIX) : -len(_SUFFIX)]), key, body[key])


def is_log_read(request: Request) -> bool:
    """Tell whether a request reads a log."""
    return request.path.endswith("/logs/poll")


def active_page(server_url: str, project: str, position: Mapping[str, Any] | None) -> Call[ActivePage]:
    """Ask for a page of up to 100 active runs, newest first; None is the first page's position."""
    place = Place(server_url, project)
    body = {"project_name": project, "only_active": True, "limit": PAGE_SIZE, **(position or {})}

    def parse(reply: Reply) -> ActivePage:
        raise_for_refusal(reply, place)
        try:
            return _page(reply.json())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ProtocolError(f"{place} answered {_PATH} with something that is not dstack's") from error

    return Call(Request.post(_PATH, body), parse, place=str(place))


def _page(items: list[Any]) -> ActivePage:
    runs: dict[tuple[str, str], Reply] = {}
    for item in items:
        runs["id", item["id"]] = reply = RunReply(200, {}, b"", item)
        # Newest first: of two runs of a name the first is the one that has it.
        runs.setdefault(("run_name", item["run_spec"]["run_name"]), reply)
    last = items[-1] if len(items) >= PAGE_SIZE else None
    position = {"prev_submitted_at": last["submitted_at"], "prev_run_id": last["id"]} if last else None
    return ActivePage(runs, position)
