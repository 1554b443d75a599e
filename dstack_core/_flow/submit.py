"""Submit exactly once (PROTOCOL 1.4).

The problem: when the reply to a submission is lost, the run may or may not exist, and repeating the request
may create a second run that costs money.

The idea: each submission carries a marker in ``configuration_path``, which every server stores and returns
unchanged. Before each submission, and after each reply that is refused, lost or malformed, the run of that
name is fetched: one with this marker is this submission's, and nothing more is sent.

Invariants: a request never forces and never names a current resource, so a server refuses it while a run of
that name is active. Only a finished run is replaced, and only where the caller allows it. A lost reply is
followed by at least ``SETTLE_SECONDS`` before the run is fetched, since the server may still be working on
the request. If it cannot be found out whether the run exists, the error states that.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from dstack_core._flow.retry import Patience, RetryBudget
from dstack_core._flow.steps import Op, Sleep, call
from dstack_core._wire.api import Api
from dstack_core._wire.runs import RunSnapshot
from dstack_core.errors import (
    ProtocolError,
    RequestRejectedError,
    RunNameTakenError,
    ServerUnreachableError,
    TransientServerError,
)
from dstack_core.models.configurations import Configuration

# How long a request whose reply was lost gets to become visible. Fetching the run sooner may miss it; a
# second submission is still refused then, so a longer pause would only delay every lost reply.
SETTLE_SECONDS = 0.5


def submit(
    api: Api,
    run_spec: Mapping[str, Any],
    budget: RetryBudget,
    *,
    replace_finished: bool,
    look_first: bool = True,
) -> Op[RunSnapshot]:
    """Return the run that carries this spec's name and marker; submit it if there is none.

    A run that carries the marker is taken as it is, finished or not. A finished run of another owner
    is replaced where ``replace_finished`` allows it (the documented meaning of a reused name), an
    active one never. After a refused, lost or malformed reply the run is fetched again, so no reply can
    cause a second run. If those replies are malformed, too, it is unknown whether the run exists, and
    ``ServerUnreachableError`` is raised. Without ``look_first`` the first request submits: for a marker
    that was just generated, which no run can carry yet; a server itself refuses to touch an active run.
    Raises ``RunNameTakenError``, ``RequestRejectedError`` and the other server errors.
    """
    patience = Patience(budget)
    refusal: RequestRejectedError | None = None
    is_unknown = False
    while True:
        try:
            found = (yield from call(api.get_run(run_spec["run_name"]))) if look_first else None
        except ProtocolError as error:
            if is_unknown:
                raise unknown(error, run_spec["run_name"]) from error
            raise
        # From the second round on a request was sent, so the run may exist.
        look_first = True
        if found is not None and found.marker == run_spec["configuration_path"]:
            return found
        if found is not None and (found.is_active or not replace_finished):
            raise _taken(api, found)
        # Another client's run would have been found. A refusal without one is about the request itself.
        if refusal is not None:
            raise refusal
        try:
            return (yield from call(api.apply(run_spec)))
        except RequestRejectedError as error:
            refusal = error
        except (TransientServerError, ProtocolError) as error:
            is_unknown = True
            # A request whose reply was lost may still be at work; give it time to become visible.
            yield Sleep(max(patience.after(error), SETTLE_SECONDS))


def unknown(error: ProtocolError, name: str) -> ServerUnreachableError:
    """Return the error for a run that was sent and may or may not have arrived."""
    return ServerUnreachableError(
        f"{error.message}. Run {name!r} was sent there, and such replies do not show whether it was submitted"
    )


def _taken(api: Api, found: RunSnapshot) -> RunNameTakenError:
    state = "is active" if found.is_active else f"ended as {found.status}"
    return RunNameTakenError(
        f"run_name: expected a name that is free, got {found.name!r}: a run of that name {state} in project "
        f"{api.project} on {api.server_url}. Choose another run_name, or stop that run first: "
        f"{api.run_url(found.id)}"
    )


def random_run_name(configuration: Configuration) -> str:
    """Return a name that no run has yet, such as ``task-3f9a1c2b7d``."""
    kind = "dev" if configuration.type == "dev-environment" else configuration.type
    return f"{kind}-{uuid.uuid4().hex[:10]}"


def random_marker() -> str:
    """Return a marker that only this one submission has."""
    return f"dstack-core:{uuid.uuid4()}"
