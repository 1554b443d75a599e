"""Wait until a service answers."""

from __future__ import annotations

from dstack_core._flow.queries import get_known_run
from dstack_core._flow.steps import Op, Sleep, call
from dstack_core._wire.api import Api
from dstack_core._wire.runs import outcome_of
from dstack_core.errors import ConfigurationError, TransientServerError
from dstack_core.models.outcome import RunFailedError


def wait_until_ready(api: Api, run_name: str, run_id: str, poll_interval: float) -> Op[str]:
    """Return the service's address once it answers there and no replica from before an update is left.

    Raises the ``RunError`` of a run that ends before, ``ConfigurationError`` for a run that is not a
    service, ``RunNotFoundError`` and the other server errors.
    """
    while True:
        run = yield from get_known_run(api, run_name, run_id)
        if run.service is None:
            raise ConfigurationError(
                f"run {run_name}: expected a service, got one without an address that could answer."
            )
        url = api.absolute(run.service.url)
        if not run.is_active:
            page = api.run_url(run.id)
            outcome = outcome_of(run, page).raise_for_status()
            raise RunFailedError(f"Run {run_name} {outcome.message} before it answered. See {page}", outcome)
        # The run's own status lags behind its jobs', so the jobs decide. During an update the old replicas
        # still answer at the same address.
        if run.runs_somewhere and not run.is_updating and (yield from _answers(api, url)):
            return url
        yield Sleep(poll_interval)


def _answers(api: Api, url: str) -> Op[bool]:
    try:
        # A reply to HEAD has no body, and only the body of a 404 shows whether the service or the server in
        # front of it sent the reply, so that case needs a GET.
        is_answering = yield from call(api.ask_service(url, "HEAD"))
        if is_answering is None:
            is_answering = yield from call(api.ask_service(url, "GET"))
    except TransientServerError:
        # An address that cannot be reached yet is a service that is not ready, not a fault to retry for.
        return False
    return bool(is_answering)
