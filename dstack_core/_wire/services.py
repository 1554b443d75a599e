"""Read from a reply whether a service answers, or something in front of it (PROTOCOL 1.9)."""

from __future__ import annotations

import re

from dstack_core._wire.http_messages import Reply

# What proxies answer for a service that does not listen. Any other status can be the service's own.
_NOBODY_THERE = frozenset({502, 503, 504})
_NOT_FOUND = re.compile(r"Service \S+ not found")


def service_answers(reply: Reply, method: str) -> bool | None:
    """Return whether the service itself sent this reply; None where that takes a reply with a body.

    The server answers 404 with a text of its own until the service has a replica that it considers ready,
    then 502 until something listens on the port. Any other reply, an error of the service included, is the
    service's.
    """
    if reply.status in _NOBODY_THERE:
        return False
    if reply.status != 404:
        return True
    if method == "HEAD":
        return None
    # Both the server and the service may answer 404; the server's has this text.
    try:
        detail = reply.json()["detail"]
    except (ValueError, KeyError, TypeError):
        return True
    return not (isinstance(detail, str) and _NOT_FOUND.fullmatch(detail))
