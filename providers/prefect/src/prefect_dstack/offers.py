"""The task that waits until a machine is to be had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, cast

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_dstack._cancellation import StopRequested
from prefect_dstack._checks import check_seconds
from prefect_dstack._names import task_owner
from prefect_dstack._waits import Waits, cancelled, run_logger
from prefect_dstack.credentials import CredentialsLike, aload, load, open_async_client, open_client

if TYPE_CHECKING:
    from dstack_core import Offers, Resources

# The server's words for an offer that a run would not get now.
_NOT_TO_BE_HAD = ("not_available", "no_quota")


class OfferOptions(TypedDict, total=False):
    """What else is asked of a machine; ``client.offers`` explains the options."""

    backends: Sequence[str] | None
    regions: Sequence[str] | None
    instance_types: Sequence[str] | None
    fleets: Sequence[str] | None
    spot_policy: str
    max_price: float | None


@task(cache_policy=NO_CACHE, retries=0)
def wait_for_offer(
    resources: Resources | Mapping[str, Any] | str | int | None = None,
    credentials: CredentialsLike = None,
    *,
    timeout: float = 3600.0,
    poll_interval: float = 60.0,
    retry_budget: float = 600.0,
    **options: Unpack[OfferOptions],
) -> dict[str, Any]:
    """Wait until a machine is to be had, such as one below a price, and return the cheapest.

    Nothing is reserved: a run that is submitted afterwards may still find the machine gone.

    Args:
        resources: What the machine has, as for ``run_task``: ``"24GB.."``, ``"H100:2"``, a dict or
            ``Resources``. Default: any machine.
        credentials: A ``DstackCredentials`` block, the name of a saved one, or None for the environment and
            ``~/.dstack/config.yml``.
        timeout: Seconds to wait. Default: 3600.
        poll_interval: Seconds between two requests for offers. Default: 60.
        retry_budget: Seconds to keep retrying an unreachable server. Default: 600.
        max_price: The highest price of a machine in USD per hour. Default: no limit.
        backends: Only machines of these backends. Default: all of the project's.
        regions: Only machines of these regions. Default: all.
        instance_types: The only types of machines, in the cloud's words. Default: all.
        fleets: Only machines of these fleets. Default: fleets are ignored.
        spot_policy: ``"spot"``, ``"on-demand"`` or ``"auto"`` for both. Default: ``"auto"``.

    Returns:
        The fields of ``dstack_core.Offer`` as a dict of JSON-plain values, such as ``backend``, ``region``,
        ``instance``, ``price_per_hour`` (USD), ``spot`` and ``gpu``.

    Raises:
        ConfigurationError: A value is wrong.
        WaitTimeoutError: No such machine was to be had in time.
        ServerError: The server errors.

    Example:
        ```python
        from prefect import flow

        from prefect_dstack import run_task, wait_for_offer


        @flow
        def train_when_cheap() -> None:
            offer = wait_for_offer("80GB..", max_price=2.0, timeout=6 * 3600)
            run_task("train.dstack.yml", max_price=2.0, backends=[offer["backend"]])
        ```
    """
    check_seconds(timeout=timeout, poll_interval=poll_interval, retry_budget=retry_budget)
    search = _Search(resources, options, timeout, poll_interval)
    waits = Waits(task_owner())
    try:
        with open_client(load(credentials), retry_budget=retry_budget) as client:
            while (pause := search.take(client.offers(resources, **search.options))) is not None:
                waits.sleep(pause)
        return search.found
    except StopRequested as request:
        return cast("dict[str, Any]", cancelled(request, "Nothing was submitted."))
    finally:
        waits.close()


@task(cache_policy=NO_CACHE, retries=0)
async def await_for_offer(
    resources: Resources | Mapping[str, Any] | str | int | None = None,
    credentials: CredentialsLike = None,
    *,
    timeout: float = 3600.0,
    poll_interval: float = 60.0,
    retry_budget: float = 600.0,
    **options: Unpack[OfferOptions],
) -> dict[str, Any]:
    """Wait until a machine is to be had: the async twin of ``wait_for_offer``.

    Parameters, result and errors are the same.
    """
    check_seconds(timeout=timeout, poll_interval=poll_interval, retry_budget=retry_budget)
    search = _Search(resources, options, timeout, poll_interval)
    waits = Waits(task_owner())
    try:
        async with open_async_client(await aload(credentials), retry_budget=retry_budget) as client:
            while (pause := search.take(await client.offers(resources, **search.options))) is not None:
                await waits.asleep(pause)
        return search.found
    except StopRequested as request:
        return cast("dict[str, Any]", cancelled(request, "Nothing was submitted."))
    finally:
        waits.close()


class _Search:
    """The wait for an offer: what is asked for, until when, and what was found."""

    def __init__(
        self, resources: object, options: OfferOptions, timeout: float, poll_interval: float
    ) -> None:
        from dstack_core import check_options, clock

        check_options(options, OfferOptions.__optional_keys__)
        self.options: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        self.found: dict[str, Any] = {}
        self._shown = ", ".join(
            [str(resources), *(f"{name}={value!r}" for name, value in self.options.items())]
        )
        self._timeout = timeout
        self._poll_interval = poll_interval
        self._deadline = clock.monotonic() + timeout
        self._logger = run_logger()
        self._has_logged = False

    def take(self, offers: Offers) -> float | None:
        """Return the seconds until the next request; None once a machine was found.

        Raises ``WaitTimeoutError``.
        """
        from dstack_core import WaitTimeoutError, clock

        for offer in offers:
            if offer.availability not in _NOT_TO_BE_HAD:
                self.found = asdict(offer)
                self._logger.info(
                    "A machine is to be had: %s (%s, %s), %.2f USD per hour.",
                    *(offer.instance, offer.backend, offer.region, offer.price_per_hour),
                )
                return None
        left = self._deadline - clock.monotonic()
        if left <= 0:
            raise WaitTimeoutError(
                f"No machine was to be had within {self._timeout:g} s ({self._shown}). Ask for less, or "
                "wait longer."
            )
        if not self._has_logged:
            self._has_logged = True
            self._logger.info("Waiting for a machine: %s.", self._shown)
        return min(self._poll_interval, left)
