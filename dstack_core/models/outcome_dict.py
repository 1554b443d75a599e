"""An outcome as a dict of values that JSON has, for type checkers."""

from typing import Any, NotRequired

# Before Python 3.12, pydantic takes only this one; it checks the parameters of flows.
from typing_extensions import TypedDict


class OutcomeDict(TypedDict):
    """The outcome of a run as ``Outcome.to_dict`` writes it; XComs of Airflow and results of Prefect have it.

    The keys are the fields of ``Outcome``, which explains them. ``status`` is a str, and a metric that is not
    finite is ``"nan"``, ``"inf"`` or ``"-inf"``. ``skipped`` is the reason of a function that was skipped, in
    Prefect. What another version wrote may lack keys or have more: ``Outcome.from_dict`` reads it.
    """

    run_name: str
    run_id: str
    project: str
    status: str
    exit_status: int | None
    reason: str | None
    message: str
    cost: float
    duration: float | None
    instance: str | None
    backend: str | None
    region: str | None
    price_per_hour: float | None
    url: str
    result: Any
    metrics: dict[str, float | str]
    has_result: bool
    debug_seconds: float
    debug_cost: float
    debug_command: str
    debug_done: str
    utilization: dict[str, Any] | None
    category: str
    cause: str
    next_step: str
    attempts: list[dict[str, Any]]
    skipped: NotRequired[str]
