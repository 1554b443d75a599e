"""Send a spec with tags that a run can do without: those of a client, and of a workflow engine.

The problem: servers before 0.19.5 refuse a run with tags, and asking every server for its version would cost
each submission a request.

The idea: the tags are sent, and if the server refuses the request, its version is fetched: an old server gets
the same run without them. From then on this client knows, and asks no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dstack_core._flow.steps import Op
from dstack_core._flow.version_check import VersionCheck
from dstack_core._wire.runs import RunSnapshot
from dstack_core.errors import ServerError

_NEED = "tags"


def send_with_tags(
    send: Callable[[Mapping[str, str]], Op[RunSnapshot]],
    tags: Mapping[str, str],
    version_check: VersionCheck,
) -> Op[RunSnapshot]:
    """Return the run that ``send`` submits with these tags, or without them to a server that has none."""
    if not tags or version_check.lacks(_NEED):
        return (yield from send({}))
    try:
        return (yield from send(tags))
    except ServerError as error:
        if not (yield from version_check.lacks_after(error, _NEED)):
            raise
    return (yield from send({}))
