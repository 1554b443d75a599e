"""Read the body of a reply, within limits of time and size."""

from __future__ import annotations

import time

import requests

from dstack_core._transport.settings import LARGEST_REPLY, TOO_BIG, TransportSettings
from dstack_core.errors import ProtocolError, TransientServerError

_PART = 256 * 1024


def read_whole(reply: requests.Response, settings: TransportSettings, deadline: float) -> bytes:
    """Return the body. Raises ``TransientServerError`` once ``deadline`` (monotonic) has passed."""
    body = bytearray()
    # Unlike the other ways to read, this one returns whenever bytes have come.
    while part := reply.raw.read1(_PART, decode_content=True):
        body += part
        if len(body) > LARGEST_REPLY:
            raise ProtocolError(TOO_BIG)
        if time.monotonic() > deadline:
            raise TransientServerError(settings.too_slow)
    return bytes(body)
