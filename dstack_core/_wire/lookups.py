"""Answer requests for one run each out of a page of ``runs/list`` (PROTOCOL 1.7)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote

from dstack_core._wire.http_messages import Call, Place, Reply, Request, raise_for_refusal
from dstack_core._wire.runs import RunSnapshot, parse_run
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


class Sighting(NamedTuple):
    """Hold one run of a page: what looks it up, what the server says, and that as it was written.

    ``run`` is None where what is written cannot be read.
    """

    lookups: tuple[Lookup, Lookup]
    run: RunSnapshot | None
    written: str

    @property
    def reply(self) -> Reply:
        """Return the reply to one of the lookups."""
        return Reply(200, {}, self.written.encode())


class ActivePage:
    """Read one page of active runs, newest first, one run at a time.

    A page that is held as a whole is so many objects that a few of them make Python collect its garbage,
    which holds up all else in a process for as long as that process is big. Iterating raises
    ``ProtocolError``; ``position`` is where the next page begins, None on the last one or before the end.
    """

    def __init__(self, place: Place, project: str, reply: Reply) -> None:
        self.position: Mapping[str, Any] | None = None
        self._place = place
        self._project = project
        self._reply = reply

    def __iter__(self) -> Iterator[Sighting]:
        """Yield what is on it."""
        number, item = 0, None
        try:
            for item, written in _items(self._reply.body.decode()):
                number += 1
                lookups = (
                    Lookup(self._project, "id", item["id"]),
                    Lookup(self._project, "run_name", item["run_spec"]["run_name"]),
                )
                yield Sighting(lookups, _read(item), written)
            if item is not None and number >= PAGE_SIZE:
                self.position = {"prev_submitted_at": item["submitted_at"], "prev_run_id": item["id"]}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ProtocolError(
                f"{self._place}: expected a reply of dstack to {_PATH}, got another one"
            ) from error


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
    """Ask for a page of up to 100 active runs; None is the first page's position."""
    place = Place(server_url, project)
    body = {"project_name": project, "only_active": True, "limit": PAGE_SIZE, **(position or {})}

    def parse(reply: Reply) -> ActivePage:
        raise_for_refusal(reply, place)
        return ActivePage(place, project, reply)

    return Call(Request.post(_PATH, body), parse, place=str(place))


def _read(item: Any) -> RunSnapshot | None:
    try:
        return parse_run(item)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        # Whoever follows this run reads it again, and says what is wrong.
        return None


def _items(text: str) -> Iterator[tuple[Any, str]]:
    """Yield the items of a list in JSON, each with its own text; raises ``ValueError`` for anything else."""
    read = json.JSONDecoder().raw_decode
    before = _BETWEEN_ITEMS.match(text)
    if before is None or before[1] != "[":
        raise ValueError("expected a list")
    if text[before.end() :] == "]":
        return
    while before[1] != "]":
        item, end = read(text, before.end())
        yield item, text[before.end() : end]
        before = _BETWEEN_ITEMS.match(text, end)
        if before is None or before[1] == "[":
            raise ValueError("expected a complete list")
