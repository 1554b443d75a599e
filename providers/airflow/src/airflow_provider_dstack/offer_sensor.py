"""Wait until a machine is on offer below a price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk import BaseSensorOperator, PokeReturnValue

from airflow_provider_dstack._compat import conf
from airflow_provider_dstack._parameters import yes_or_no

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import Context
    from airflow_provider_dstack.hooks import DstackHook

# How many offers one poll reads, the cheapest first.
_MOST_OFFERS = 50


class DstackOfferSensor(BaseSensorOperator):
    """A sensor that waits until the project could get a machine that fits, below a price.

    Fleets restrict nothing unless ``fleets`` names some. An offer reserves nothing: a run that starts later
    may find it gone.

    Args:
        run_resources: The machine: a dict as in YAML, or a text such as ``"24GB.."``. With
            ``{"gpu": "A100:40GB..:1.."}`` one A100 or more, of 40 GB or more. Default: any.
        max_price: The highest price, in USD per hour. Default: no limit.
        spot_policy: ``"spot"``, ``"on-demand"`` or ``"auto"`` for both. Default ``"auto"``.
        backends: The only backends (list of str). Default: all of the project's.
        regions: The only regions (list of str). Default: all.
        instance_types: The only types of machine (list of str). Default: all.
        fleets: The only fleets (list of str). Default: any machine of the backends.
        dstack_conn_id: The connection of type ``dstack``. Default ``dstack_default``.
        project_name: Replaces the connection's project. Default: the connection's.
        deferrable: Have the triggerer wait, and give the worker's slot back. Default: Airflow's setting
            ``[operators] default_deferrable``.
        poke_interval: Seconds or a ``timedelta`` between two polls. Default 60.
        **kwargs: As for Airflow's sensors. ``mode`` is ``"poke"`` or ``"reschedule"``. Until ``timeout``
            (seconds) an unreachable server is retried.

    Returns:
        The cheapest offer as a dict: ``backend``, ``region``, ``instance``, ``price_per_hour`` (USD),
        ``spot``, ``availability``, ``gpu``, ``gpus`` and ``gpu_memory`` (bytes).

    Raises:
        AirflowFailException: Input or access is wrong.

    Example:
        ``DstackOfferSensor(task_id="wait", run_resources={"gpu": "A100"}, max_price=1.5, deferrable=True)``

    Source: Airflow documentation, "Sensors".
    """

    template_fields: Sequence[str] = (
        *("run_resources", "max_price", "spot_policy", "backends", "regions", "instance_types", "fleets"),
        *("dstack_conn_id", "project_name"),
    )
    ui_color = "#e8e4ff"

    def __init__(
        self,
        *,
        run_resources: Mapping[str, Any] | str | int | None = None,
        max_price: float | str | None = None,
        spot_policy: str | None = None,
        backends: Sequence[str] | None = None,
        regions: Sequence[str] | None = None,
        instance_types: Sequence[str] | None = None,
        fleets: Sequence[str] | None = None,
        dstack_conn_id: str = "dstack_default",
        project_name: str | None = None,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        poke_interval: timedelta | float = 60.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(poke_interval=poke_interval, **kwargs)
        self.run_resources = run_resources
        self.max_price = max_price
        self.spot_policy = spot_policy
        self.backends = backends
        self.regions = regions
        self.instance_types = instance_types
        self.fleets = fleets
        self.dstack_conn_id = dstack_conn_id
        self.project_name = project_name
        self.deferrable = yes_or_no("deferrable", deferrable)

    def execute(self, context: Context) -> Any:
        """Wait in the worker, or have the triggerer wait."""
        if not self.deferrable:
            return super().execute(context)
        # The worker polls first: an event that comes before the scheduler has seen the deferral fails the
        # task.
        found = self.poke(context)
        if not found:
            self._defer()
        return found.xcom_value if isinstance(found, PokeReturnValue) else None

    def execute_complete(self, context: Context, event: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the trigger found, or raise the error that it reported."""
        if event["kind"] != "seen":
            from airflow_provider_dstack._outcome import broken_error

            raise broken_error(event)
        offer: dict[str, Any] = event["offer"]
        return offer

    def poke(self, context: Context) -> bool | PokeReturnValue:
        """Poll the offers once."""
        from airflow_provider_dstack._outcome import as_airflow_error
        from airflow_provider_dstack.offer_trigger import first_offer
        from dstack_core import DstackError as CoreError
        from dstack_core import ServerUnreachableError
        from dstack_core.integration import format_price

        try:
            with self.hook().client(retry_budget=0.0) as client:
                found = first_offer(client.offers(**self._wanted()))
        except ServerUnreachableError as error:
            self.log.warning("%s Polling again.", error.message)
            return False
        except CoreError as error:
            raise as_airflow_error(error, submitted=False) from error
        if found is None:
            self.log.info("No machine that fits is on offer.")
            return False
        price = format_price(found["price_per_hour"])
        place = f"{found['backend']}, {found['region']}"
        self.log.info("On offer: %s (%s) at %s.", found["instance"], place, price)
        return PokeReturnValue(True, found)

    def hook(self) -> DstackHook:
        """Return the hook of this sensor's connection and project."""
        from airflow_provider_dstack.hooks import DstackHook

        return DstackHook(self.dstack_conn_id, self.project_name)

    def _defer(self) -> NoReturn:
        from airflow_provider_dstack.offer_trigger import DstackOfferTrigger

        trigger = DstackOfferTrigger(
            dstack_conn_id=self.dstack_conn_id,
            project_name=self.project_name,
            wanted=self._wanted(),
            poll_interval=self.poke_interval,
        )
        limit = timedelta(seconds=self.timeout)
        self.defer(trigger=trigger, method_name="execute_complete", timeout=limit)

    def _wanted(self) -> dict[str, Any]:
        """Return the arguments of ``client.offers`` as plain values: a trigger is kept in a database."""
        from airflow_provider_dstack._parameters import read_price

        names = ("spot_policy", "backends", "regions", "instance_types", "fleets")
        given = {name: getattr(self, name) for name in names}
        given |= {"resources": self.run_resources, "max_price": read_price(self.max_price)}
        wanted = {name: value for name, value in given.items() if value is not None}
        return {**wanted, "limit": _MOST_OFFERS}
