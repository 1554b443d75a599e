"""Kill the process at the other end of a connection."""

from __future__ import annotations

import contextlib
import os

import psutil

Address = tuple[str, int]


def kill_client(client: Address, server: Address) -> None:
    """End by SIGKILL the process that holds the connection from ``client`` to ``server``, and wait until it has ended.

    Raises ``RuntimeError`` if no process holds it, several do, or this one does.
    """
    # A port alone is not enough: connections to different servers may share one.
    owners = {
        one.pid
        for one in psutil.net_connections("tcp4")
        if (one.laddr, one.raddr) == (client, server) and one.pid
    }
    if len(owners) != 1 or os.getpid() in owners:
        raise RuntimeError(
            f"the connection from {client} to {server} is held by {sorted(owners) or 'no process'}"
        )
    # Another case may have killed the process, and it may end between two calls.
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(owners.pop())
        process.kill()
        # A zombie no longer holds anything either.
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            psutil.wait_procs([process], timeout=0.01)
