"""Wait until a run has a container, then open the way to it (PROTOCOL 4.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from dstack_core._flow.steps import Flow, Op, Sleep, call, do
from dstack_core._wire.api import Api
from dstack_core._wire.attach import Approach, Route
from dstack_core._wire.runs import RunSnapshot


class Openable(Protocol):
    """Be the connection to one job's container."""

    def open(self, private_key: str | None) -> None:
        """Connect; ``private_key`` is the one the server keeps for the user, PEM, or None."""

    def close(self) -> None:
        """Disconnect; also ends an ``open`` at work in another thread."""


OpenableT = TypeVar("OpenableT", bound=Openable)


def attach(
    api: Api,
    run_name: str,
    run_id: str,
    new: Callable[[Approach, Route], OpenableT],
    *,
    node: int,
    poll_interval: float,
) -> Flow[tuple[RunSnapshot, OpenableT | None]]:
    """Return the run and the open connection, None when the run is over or on its way there.

    Raises what ``open`` raises, ``ConfigurationError`` for a node the run has not, and the server errors.
    """
    approach = yield from wait_for_container(api, run_name, run_id, node, poll_interval)
    if approach.route is None:
        return approach.run, None
    private_key = yield from call(api.get_private_key(run_name))
    connection = new(approach, approach.route)
    try:
        yield from do(lambda: connection.open(private_key))
    except BaseException:
        connection.close()
        raise
    return approach.run, connection


def wait_for_container(api: Api, run_name: str, run_id: str, node: int, poll_interval: float) -> Op[Approach]:
    """Return the first look at which the node's container runs, or at which none is to come."""
    while True:
        approach = yield from call(api.get_approach(run_name, run_id, node))
        if not approach.waiting:
            return approach
        yield Sleep(poll_interval)
