"""Answer requests for one run each from a page of ``runs/list`` (PROTOCOL 1.7).

The problem: a page has up to 100 runs, and reading it takes most of the time of a round of polls.

The idea: the page is read run by run. What is handed out is the run's own piece of the page's text, which is
exactly what ``runs/get`` would reply, so a flow reads it as the reply to its own request. Python objects of
one run exist at a time.

Invariants: a run that cannot be read does not affect the others on its page; its follower reads the reply and
names the fault. A reply that is not a page raises ``ProtocolError``, but the runs read before that stand.
"""

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

# The server's own limit and default (PROTOCOL 1.7). A smaller page costs more requests for the same runs.
PAGE_SIZE = 100
_PREFIX, _SUFFIX = "/api/project/", "/runs/get"
_PATH = "/api/runs/list"
_BETWEEN_ITEMS = re.compile(r"\s*([\[,\]])\s*")


@dataclass(frozen=True, slots=True)
class Lookup:
    """The run a request asks for: ``key`` is ``id`` or ``run_name``, ``value`` the run's."""

    project: str
    key: str
    value: str


class Sighting(NamedTuple):
    """One run of a page: the lookups it answers, its snapshot, and its part of the page's text.

    ``run`` is None where that text cannot be read.
    """

    lookups: tuple[Lookup, Lookup]
    run: RunSnapshot | None
    written: str

    @property
    def reply(self) -> Reply:
        """Return the reply to one of the lookups."""
        return Reply(200, {}, self.written.encode())


class ActivePage:
    """One page of active runs, newest first, read one run at a time.

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
        """Yield the runs of the page."""
        number, item = 0, None
        try:
            for item, written in _items(self._reply.body.decode()):
                number += 1
                lookups = (
                    Lookup(self._project, "id", item["id"]),
                    Lookup(self._project, "run_name", item["run_spec"]["run_name"]),
                )
                yield Sighting(lookups, _read(item), written)
            # Only a full page has another one behind it.
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
    # By id deleted runs are found too, but on no page: they are polled alone.
    key = "id" if body.get("id") else "run_name"
    return Lookup(unquote(path[len(_PREFIX) : -len(_SUFFIX)]), key, body[key])


def is_log_read(request: Request) -> bool:
    """Return whether a request reads a log."""
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
        # The follower of this run reads the reply again, and its error names the run and the fault.
        return None


def _items(text: str) -> Iterator[tuple[Any, str]]:
    """Yield the items of a list in JSON, each with its own text; raises ``ValueError`` for anything else."""
    # ``json.loads`` would build the objects of all runs at once.
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
