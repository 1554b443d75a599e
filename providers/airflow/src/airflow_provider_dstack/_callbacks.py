"""Callbacks, metrics and traces of a task's run; the calls are made by ``dstack_core``.

The problem: a deferred task's run is followed by the worker, by one triggerer after another, and by the
resumed task. Each of them must call user code, none too often, and objects cannot travel between them.

The idea: a class travels by its path. The position in the run's events is that of the calls, too, and each
process waits for its calls before it hands over, so that the next one begins behind them. The end is
reported where the task has its outcome: in the worker, in both modes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._compat import conf, stats
from airflow_provider_dstack.errors import AirflowFailException

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import TaskInstanceLike
    from dstack_core import CallbacksLike, Outcome
    from dstack_core.integration import CallbackNotifier

_METRICS_SWITCHES = ("statsd_on", "statsd_datadog_enabled", "otel_on")


def check_callbacks(given: Any, *, deferrable: bool) -> CallbacksLike:
    """Return ``callbacks`` as the operator keeps them. Raises ``ValueError`` for what cannot be called."""
    if given is None:
        return None
    # Only with callbacks: the file of a DAG without them imports nothing of dstack_core.
    from dstack_core import ConfigurationError
    from dstack_core import check_callbacks as check

    try:
        return check(given, by_path=deferrable)
    except ConfigurationError as error:
        raise ValueError(error.message) from None


def load_callbacks(given: CallbacksLike) -> list[Any]:
    """Return instances of the callbacks. Raises ``AirflowFailException`` when one cannot be made."""
    if not given:
        return []
    from dstack_core import ConfigurationError
    from dstack_core import load_callbacks as load

    try:
        return load(given)
    except ConfigurationError as error:
        raise AirflowFailException(error.message) from None


def load_what_can_be(given: CallbacksLike, log: Any) -> list[Any]:
    """Return instances of the callbacks for a run that exists: one warning if one cannot be made."""
    try:
        return load_callbacks(given)
    except Exception as error:
        log.warning("%s The callbacks of this task are not called in this process.", error)
        return []


def source_of(ti: TaskInstanceLike | None) -> dict[str, str]:
    """Return which task instance follows a run, for callbacks."""
    if ti is None:
        return {}
    names = ("dag_id", "task_id", "run_id", "try_number", "map_index")
    found = {name: getattr(ti, name, None) for name in names}
    return {name: str(value) for name, value in found.items() if value is not None}


def new_notifier(
    callbacks: Sequence[Any],
    ti: TaskInstanceLike | None,
    log: Any,
    mask: Callable[[str], str] = str,
) -> CallbackNotifier:
    """Return what calls the callbacks (instances) of one run."""
    from dstack_core.integration import CallbackNotifier

    return CallbackNotifier(callbacks, log=log, mask=mask, source=source_of(ti))


def since_in(event: Mapping[str, Any]) -> dict[str, float]:
    """Return when each status of the run was seen first, from a trigger's event."""
    found = (event.get("rest") or {}).get("progress", {}).get("since") or event.get("since") or {}
    return dict(found)


def report_end(outcome: Outcome, since: Mapping[str, float], log: Any) -> None:
    """Add a run that has ended to Airflow's metrics and to the task's trace, where these are switched on.

    Does not raise: a metrics server must not fail a task. Source: Airflow documentation, "Metrics
    Configuration" and "Traces Configuration".
    """
    from dstack_core.integration import trace_run

    try:
        trace_run(outcome, since)
        if any(conf.getboolean("metrics", name, fallback=False) for name in _METRICS_SWITCHES):
            _count(outcome, since)
    except Exception as error:
        log.warning("Could not report run %s to metrics or traces: %r.", outcome.run_name, error)


def _count(outcome: Outcome, since: Mapping[str, float]) -> None:
    from dstack_core.integration import wait_seconds

    to, status = stats(), str(outcome.status)
    named = {"status": status, "backend": outcome.backend, "instance": outcome.instance}
    if outcome.category:
        named["category"] = outcome.category
    # In StatsD's names Airflow drops a metric with any other character, such as those of "NVIDIA L4".
    tags = {name: re.sub(r"[^\w./-]", "_", value or "none", flags=re.ASCII) for name, value in named.items()}
    to.incr("dstack.runs", tags=tags)
    # Without tags in the name, StatsD would not show how the runs ended.
    to.incr(f"dstack.runs.{status}")
    to.incr("dstack.cost_usd", outcome.cost, tags=tags)
    if (waited := wait_seconds(since)) is not None:
        to.gauge("dstack.wait_seconds", waited, tags=tags)
    if outcome.duration is not None:
        to.gauge("dstack.duration_seconds", outcome.duration, tags=tags)
