"""Waiting until a run has a container, then connecting to it (PROTOCOL 4.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from dstack_core._flow.steps import Flow, Op, Sleep, call, do
from dstack_core._wire.api import Api
from dstack_core._wire.attach import Approach, Route
from dstack_core._wire.runs import RunSnapshot


class Openable(Protocol):
    """A connection to one job's container."""

    def open(self, private_key: str | None) -> None:
        """Connect; ``private_key`` is the one that the server keeps for the user (PEM), or None."""

    def close(self) -> None:
        """Disconnect; also ends an ``open`` that is under way in another thread."""


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
    """Return the run and the open connection, None if the run has ended or is ending.

    Args:
        api: The requests of the project.
        run_name: The run's name.
        run_id: The run's id.
        new: Returns a connection to the container, not open yet.
        node: The node of the job.
        poll_interval: Seconds between two polls of the run.

    Raises:
        AttachError: Connecting failed, or anything else that ``open`` raises.
        ConfigurationError: The run does not have that node.
        ServerError: The server errors.
    """
    approach = yield from wait_for_container(api, run_name, run_id, node, poll_interval)
    if approach.route is None:
        return approach.run, None
    private_key = yield from call(api.get_private_key(run_name))
    connection = new(approach, approach.route)
    try:
        yield from do(lambda: connection.open(private_key))
    except BaseException:
        # Also for a KeyboardInterrupt and a cancelled task: no thread and no port stays behind.
        connection.close()
        raise
    return approach.run, connection


def wait_for_container(api: Api, run_name: str, run_id: str, node: int, poll_interval: float) -> Op[Approach]:
    """Poll the run until the node's container runs, or until none will come; return the last poll."""
    while True:
        approach = yield from call(api.get_approach(run_name, run_id, node))
        if not approach.waiting:
            return approach
        yield Sleep(poll_interval)
