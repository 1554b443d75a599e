"""A run as a dict of values that JSON has, for type checkers."""

from typing import NotRequired

# Before Python 3.12, pydantic takes only this one; it checks the parameters of flows.
from typing_extensions import TypedDict

from dstack_core import OutcomeDict


class RunDict(TypedDict):
    """A run as of its last poll, as the tasks that submit, deploy and fetch runs return it.

    ``url`` is the run's page, ``service_url`` the address of a service (None for a task), ``marker``
    identifies the submission, ``outcome`` is None until the run has ended. ``wait_for_run`` masks by
    ``mask_env`` and ``secret_names`` (names of variables); a run that was fetched by its name has neither.
    """

    run_name: str
    run_id: str
    status: str
    url: str
    service_url: str | None
    marker: str | None
    outcome: OutcomeDict | None
    mask_env: NotRequired[str | list[str]]
    secret_names: NotRequired[list[str]]
