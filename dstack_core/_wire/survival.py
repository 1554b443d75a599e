"""What a run survives, as a run spec has it, and what became of it.

The problem: dstack's ``retry`` knows events and a duration, but no number of attempts; and for a run that had
a machine once, its duration begins anew with each loss (dstack 0.22.5: ``_should_retry_job``). A follower has
to enforce the rest, and any process may be the one that follows.

The idea: the limits travel with the run, in its environment (``DSTACK_SURVIVE``), so that every follower
reads them from the run that it polls. Whether a limit has passed follows from the run's attempts alone. So
all processes see the same, and a run that was stopped for it is recognized later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from dstack_core._wire.checkpoints import check_checkpoint
from dstack_core._wire.http_messages import time_of
from dstack_core.errors import ConfigurationError
from dstack_core.models.configurations import Configuration, Task

if TYPE_CHECKING:
    from dstack_core._wire.runs import RunSnapshot, Submission
    from dstack_core.models.survive import Survive

SURVIVE = "DSTACK_SURVIVE"
_INTERRUPTED = "interrupted_by_no_capacity"


def with_survival(
    configuration: Configuration, survive: Survive | None, *, has_policy: bool
) -> Configuration:
    """Return the configuration of a run that survives; ``has_policy``: a retry policy was given, too.

    Raises ``ConfigurationError``.
    """
    if survive is None:
        return configuration
    if not isinstance(configuration, Task):
        raise ConfigurationError(
            f"survive: expected a task, got type {configuration.type!r}. Use retry_policy for it."
        )
    if has_policy:
        raise ConfigurationError(
            "survive: expected no retry_policy with it, got both. Leave one of them out."
        )
    if configuration.retry:
        raise ConfigurationError(
            "survive: expected no `retry` in the configuration with it, got both. Leave one of them out."
        )
    if survive.checkpoint is not None:
        check_checkpoint(configuration, survive.checkpoint)
    limits: dict[str, Any] = {"seconds": survive.seconds}
    if survive.times is not None:
        limits["times"] = survive.times
    # After the fill-in, the environment is a mapping.
    own = configuration.env if isinstance(configuration.env, Mapping) else {}
    env = {**own, SURVIVE: json.dumps(limits)}
    retry = {"on_events": list(survive.events), "duration": survive.seconds}
    return configuration.model_copy(update={"env": env, "retry": retry})


def passed_limit(run: RunSnapshot, now: datetime) -> str | None:
    """Return in words which limit of ``survive`` a run has passed by ``now``, None if none."""
    limits = _limits(run)
    lost = lost_attempts(run)
    if not limits or not lost:
        return None
    times, seconds = limits.get("times"), limits.get("seconds")
    if isinstance(times, int) and len(lost) > times:
        return f"survive allows {times} of them"
    if isinstance(seconds, int):
        begun = time_of(run.submitted_at)
        late = [one.finished_at for one in lost if one.finished_at is not None]
        if run.status.has_no_machine or not run.is_active:
            late.append(now)
        if any((each - begun).total_seconds() > seconds for each in late):
            return "the duration of survive has passed"
    return None


def lost_attempts(run: RunSnapshot) -> list[Submission]:
    """Return the attempts whose machine was taken away, one submission of each."""
    lost = {one.attempt: one for job in run.jobs for one in job.submissions if one.reason == _INTERRUPTED}
    return [lost[number] for number in sorted(lost)]


def loss_that_ended(run: RunSnapshot) -> tuple[Submission, str] | None:
    """Return the loss for which a follower stopped a run, and the limit in words; None for any other end."""
    if SURVIVE not in run.env or run.reason != "stopped_by_user":
        return None
    ends = [one.finished_at for job in run.jobs for one in job.submissions if one.finished_at]
    limit = passed_limit(run, max(ends)) if ends else None
    return None if limit is None else (lost_attempts(run)[-1], limit)


def _limits(run: RunSnapshot) -> Mapping[str, Any]:
    text = run.env.get(SURVIVE)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
