"""Wait in the triggerer until a machine is on offer; the sensor makes its polls in the same way."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_provider_dstack._outcome import broken_event
from airflow_provider_dstack._shared_polls import seconds_to_turn, shared_polls
from airflow_provider_dstack._threads import in_thread
from airflow_provider_dstack.hooks import DstackHook

if TYPE_CHECKING:
    from dstack_core import AsyncClient, Offers

# The server's words for a machine that cannot be had (dstack 0.18.44 to 0.22.5); it often knows nothing.
_NOT_NOW = frozenset({"not_available", "no_quota", "no_balance", "busy"})


class DstackOfferTrigger(BaseTrigger):
    """The poller of a project's offers in the triggerer: it fires once a wanted machine is on offer.

    Triggers of one project that want the same and poll in the same moment share one request. An unreachable
    server is retried; the sensor's ``timeout`` is the limit. No argument is a secret.

    Args:
        dstack_conn_id: As for ``DstackHook``.
        project_name: As for ``DstackHook``.
        wanted: The arguments of ``client.offers``, as plain values.
        poll_interval: Seconds between two polls.

    Source: Airflow documentation, "Deferrable Operators & Triggers".
    """

    def __init__(
        self,
        *,
        dstack_conn_id: str,
        project_name: str | None,
        wanted: Mapping[str, Any],
        poll_interval: float,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Airflow's is untyped
        self.dstack_conn_id = dstack_conn_id
        self.project_name = project_name
        self.wanted = dict(wanted)
        self.poll_interval = poll_interval

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the class path and the arguments to make this trigger again in another process."""
        names = ("dstack_conn_id", "project_name", "wanted", "poll_interval")
        return (
            "airflow_provider_dstack.offer_trigger.DstackOfferTrigger",
            {name: getattr(self, name) for name in names},
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Yield the one event: the cheapest machine, or why offers can no longer be fetched."""
        try:
            payload = await self._poll()
        except Exception as error:
            payload = broken_event(error)
        yield TriggerEvent(payload)  # type: ignore[no-untyped-call]  # Airflow's is untyped

    async def _poll(self) -> dict[str, Any]:
        from dstack_core import ServerUnreachableError, clock

        async with await in_thread(self._connect) as client:
            while True:
                # The worker has polled just now.
                await clock.asleep(seconds_to_turn(self.poll_interval, clock.epoch()))
                try:
                    found = await self._offer(client)
                except ServerUnreachableError as error:
                    self.log.warning("%s Polling again.", error.message)
                    continue
                if found is not None:
                    return {"kind": "seen", "offer": found}

    async def _offer(self, client: AsyncClient) -> dict[str, Any] | None:
        question = ("offers", client.server_url, client.project, json.dumps(self.wanted, sort_keys=True))
        offers: Offers = await shared_polls().ask(question, lambda: client.offers(**self.wanted))
        return first_offer(offers)

    def _connect(self) -> AsyncClient:
        """Look the connection up, which blocks."""
        return DstackHook(self.dstack_conn_id, self.project_name).async_client(retry_budget=0.0)


def first_offer(offers: Offers) -> dict[str, Any] | None:
    """Return the cheapest offer that can be had now, JSON-plain; None without one."""
    usable = [each for each in offers if each.availability not in _NOT_NOW]
    return asdict(min(usable, key=lambda each: each.price_per_hour)) if usable else None
