"""Answer requests for one run each out of a page of ``runs/list`` (PROTOCOL 1.7)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from dstack_core._wire.plain import Call, Reply, Request
from dstack_core._wire.refusals import Place, raise_for_refusal
from dstack_core.errors import ProtocolError

PAGE_SIZE = 100
_PREFIX, _SUFFIX = "/api/project/", "/runs/get"
_PATH = "/api/runs/list"
_BETWEEN_ITEMS = re.compile(r"\s*([\[,\]])\s*")


@dataclass(frozen=True, slots=True)
class Lookup:
    """Say which run a request asks for: ``key`` is ``id`` or ``run_name``, ``value`` the run's."""

    project: str
    key: str
    value: str


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
            return _page(reply.body.decode())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ProtocolError(f"{place} answered {_PATH} with something that is not dstack's") from error

    return Call(Request.post(_PATH, body), parse, place=str(place))


def _page(text: str) -> ActivePage:
    runs: dict[tuple[str, str], Reply] = {}
    number, position = 0, None
    for item, written in _items(text):
        runs["id", item["id"]] = reply = Reply(200, {}, written.encode())
        # Newest first: of two runs of a name the first is the one that has it.
        runs.setdefault(("run_name", item["run_spec"]["run_name"]), reply)
        number += 1
        position = {"prev_submitted_at": item["submitted_at"], "prev_run_id": item["id"]}
    return ActivePage(runs, position if number >= PAGE_SIZE else None)


def _items(text: str) -> Iterator[tuple[Any, str]]:
    """Yield the items of a list in JSON, each with its own text; raises ``ValueError`` for anything else.

    One at a time: a whole page is so many objects that a few pages make Python collect its garbage, which
    holds up all else in a process for as long as that process is big.
    """
    read = json.JSONDecoder().raw_decode
    before = _BETWEEN_ITEMS.match(text)
    if before is None or before[1] != "[":
        raise ValueError("it is no list")
    if text[before.end() :] == "]":
        return
    while before[1] != "]":
        item, end = read(text, before.end())
        yield item, text[before.end() : end]
        before = _BETWEEN_ITEMS.match(text, end)
        if before is None or before[1] == "[":
            raise ValueError("it is no whole list")
