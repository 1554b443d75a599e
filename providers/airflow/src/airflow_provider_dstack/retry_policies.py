"""The retry policy of a task: try again where the cause of the failure may pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

from airflow_provider_dstack._compat import Context, RetryDecision, RetryPolicy, has_retry_policies
from airflow_provider_dstack.errors import DstackRunError, DstackServerUnreachable

__all__ = ["DstackRetryPolicy"]


class DstackRetryPolicy(RetryPolicy):  # type: ignore[misc, unused-ignore]  # missing before Airflow 3.3
    """A policy that tries a task again by the failure category of its run.

    If a run ended with a category that is not in ``retry_on``, its task fails at once, despite ``retries``: a
    wrong command fails again, and a passed limit is paid for again. Everything but the end of a run and an
    unreachable server, such as a killed worker, is left to Airflow.

    A policy adds no tries: set ``retries`` too. Source: Airflow documentation, "Tasks", retry policies.

    Args:
        retry_on: Failure categories such as ``"image.pull_failed"``, and groups such as ``"capacity"``, which
            stand for all that begin with them. Default: ``capacity``, ``spot``, ``machine``,
            ``image.pull_failed``, ``server`` and ``gateway``.
        delay: Time until the next try (``timedelta``), or a dict of it by category or group; default: the
            task's ``retry_delay``.

    Raises:
        RuntimeError: This Airflow is older than 3.3 and has no retry policies.
        ValueError: A name is neither a failure category nor a group, or a delay is not a time of 0 or more.

    Example:
        ``DstackRetryPolicy(["capacity", "spot"], delay={"capacity": timedelta(minutes=10)})``
    """

    def __init__(
        self,
        retry_on: Iterable[str] | None = None,
        *,
        delay: timedelta | Mapping[str, timedelta] | None = None,
    ) -> None:
        from dstack_core import ConfigurationError
        from dstack_core.integration import RETRIED_CATEGORIES, check_categories

        if not has_retry_policies():
            raise RuntimeError(
                "DstackRetryPolicy: expected Airflow 3.3 or newer, got an Airflow without retry policies. "
                "Leave retry_policy out; run_retry_policy lets dstack itself retry."
            )
        try:
            self.retry_on = check_categories(RETRIED_CATEGORIES if retry_on is None else retry_on, "retry_on")
            self.delay: timedelta | dict[str, timedelta] | None = (
                dict(zip(check_categories(delay, "delay"), delay.values(), strict=True))
                if isinstance(delay, Mapping)
                else delay
            )
        except ConfigurationError as error:
            raise ValueError(error.message) from None
        for name, one in delay.items() if isinstance(delay, Mapping) else [("", delay)]:
            if one is not None or name:
                _check_delay(f"delay[{name!r}]" if name else "delay", one)

    def evaluate(
        self,
        exception: BaseException,
        try_number: int,
        max_tries: int,
        context: Context | None = None,
    ) -> RetryDecision:
        """Return what Airflow does after a failure.

        Args:
            exception: What the task raised.
            try_number: The number of the try, from 1.
            max_tries: The number of the last try.
            context: Airflow's context of the task, which is not used.
        """
        from dstack_core.integration import in_categories

        category = _category(exception)
        if category is None:
            return RetryDecision.default()
        if in_categories(category, self.retry_on):
            return RetryDecision.retry(delay=self._delay_of(category), reason=f"dstack: {category}")
        return RetryDecision.fail(reason=f"dstack: {category} is not retried")

    def serialize(self) -> dict[str, Any]:
        """Return the policy as values that JSON has."""
        if isinstance(self.delay, Mapping):
            delay: Any = {name: value.total_seconds() for name, value in self.delay.items()}
        else:
            delay = None if self.delay is None else self.delay.total_seconds()
        return {"retry_on": list(self.retry_on), "delay": delay}

    @classmethod
    def deserialize(cls, data: dict[str, Any]) -> DstackRetryPolicy:
        """Return the policy that ``serialize`` wrote."""
        delay = data.get("delay")
        if isinstance(delay, Mapping):
            return cls(data["retry_on"], delay={name: timedelta(seconds=one) for name, one in delay.items()})
        return cls(data["retry_on"], delay=None if delay is None else timedelta(seconds=delay))

    def _delay_of(self, category: str) -> timedelta | None:
        from dstack_core.integration import in_categories

        if not isinstance(self.delay, Mapping):
            return self.delay
        # The longest name that matches is the most specific one.
        matching = [name for name in self.delay if in_categories(category, [name])]
        return self.delay[max(matching, key=len)] if matching else None


def _check_delay(name: str, value: Any) -> None:
    if not isinstance(value, timedelta) or value < timedelta(0):
        raise ValueError(f"{name}: expected a timedelta, 0 or more, got {value!r}.")


def _category(exception: BaseException) -> str | None:
    """Return the failure category, None if neither a run nor its server caused the failure."""
    from dstack_core.integration import category_of

    if isinstance(exception, DstackRunError):
        return exception.category or None
    if isinstance(exception, DstackServerUnreachable):
        return "server.unreachable"
    # A task of your own may use ``dstack_core`` directly.
    return category_of(exception)
