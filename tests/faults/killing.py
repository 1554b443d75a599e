"""Kill the process that holds the other end of a connection."""

from __future__ import annotations

import os

import psutil


def kill_client_at(port: int, server_port: int) -> None:
    """End by SIGKILL whoever holds the connection from ``port`` to ``server_port``, and wait until it is gone.

    Raises ``RuntimeError`` where that is nobody, or this process.
    """
    # One port may be the near end of several connections, each to another far end.
    owners = {
        one.pid
        for one in psutil.net_connections("tcp4")
        if one.pid and one.laddr and one.laddr.port == port and one.raddr and one.raddr.port == server_port
    }
    if len(owners) != 1 or os.getpid() in owners:
        raise RuntimeError(f"the connection from port {port} is held by {sorted(map(str, owners))}")
    process = psutil.Process(owners.pop())
    process.kill()
    # A zombie has let go of everything it held, too.
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        psutil.wait_procs([process], timeout=0.01)
