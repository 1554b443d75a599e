"""Links from a task's page to its run, the run's log and metrics, and the service that the run serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperatorLink

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator
    from airflow.sdk.types import TaskInstanceKey

RUN_NAME_KEY = "dstack_run_name"
RUN_URL_KEY = "dstack_run_url"
LOGS_URL_KEY = "dstack_logs_url"
METRICS_URL_KEY = "dstack_metrics_url"
# What code calls, and what a browser opens: the server may have another address there.
SERVICE_URL_KEY = "dstack_service_url"
SERVICE_LINK_KEY = "dstack_service_link"
# How a run ended that did not succeed: an XCom only, since such a task returns nothing.
OUTCOME_KEY = "dstack_outcome"
# The fleet that a task has created: an XCom only, since dstack's pages of fleets list them all.
FLEET_NAME_KEY = "dstack_fleet_name"
# The volume that a task has created, likewise.
VOLUME_NAME_KEY = "dstack_volume_name"


class _PushedLink(BaseOperatorLink):
    """A link whose address is an XCom that the operator itself pushes, long before the task ends."""

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Return the address, or an empty text before the run has one."""
        from airflow.sdk.execution_time.xcom import XCom

        return str(XCom.get_value(ti_key=ti_key, key=self.xcom_key) or "")


class DstackRunLink(_PushedLink):
    """A link to the run's page on the dstack server; live from the moment the run was submitted.

    The address is the task's XCom ``dstack_run_url``. Source: Airflow documentation, "Define an operator
    extra link".
    """

    name = "dstack run"

    @property
    def xcom_key(self) -> str:
        """Return the key of the address."""
        return RUN_URL_KEY


class DstackLogsLink(_PushedLink):
    """A link to the run's log on the dstack server, live like that to the run.

    The address is the task's XCom ``dstack_logs_url``.
    """

    name = "dstack logs"

    @property
    def xcom_key(self) -> str:
        """Return the key of the address."""
        return LOGS_URL_KEY


class DstackMetricsLink(_PushedLink):
    """A link to the run's metrics (CPU, memory, GPUs) on the dstack server, live like that to the run.

    The address is the task's XCom ``dstack_metrics_url``. Servers before 0.19.27 have no such page.
    """

    name = "dstack metrics"

    @property
    def xcom_key(self) -> str:
        """Return the key of the address."""
        return METRICS_URL_KEY


class DstackServiceLink(_PushedLink):
    """A link to the service that the run serves; live once it answers.

    The address is the task's XCom ``dstack_service_link``.
    """

    name = "dstack service"

    @property
    def xcom_key(self) -> str:
        """Return the key of the address."""
        return SERVICE_LINK_KEY


RUN_LINKS = (DstackRunLink(), DstackLogsLink(), DstackMetricsLink())


def leave_pushed(operator: BaseOperator) -> None:
    """Drop those links from an operator that is executed which it pushes itself.

    At a task's end Airflow reads the address of each link of the executed operator, and pushes it once more.
    Of a task that submitted nothing it would log an error for each, and push empty texts.
    """
    links = operator.operator_extra_links
    operator.operator_extra_links = tuple(one for one in links if not isinstance(one, _PushedLink))


def push(ti: Any, key: str, value: Any, log: Any) -> None:
    """Write an XCom; if this fails, one warning is logged and the task continues."""
    try:
        ti.xcom_push(key=key, value=value)
    except Exception as error:
        log.warning("Could not write the XCom %s: %r.", key, error)
