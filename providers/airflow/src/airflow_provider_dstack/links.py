"""Links from a task's page to its run, and to the service that the run serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperatorLink

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator
    from airflow.sdk.types import TaskInstanceKey

RUN_NAME_KEY = "dstack_run_name"
RUN_URL_KEY = "dstack_run_url"
SERVICE_URL_KEY = "dstack_service_url"


class DstackRunLink(BaseOperatorLink):
    """A link to the run's page on the dstack server; live from the moment the run was submitted.

    The address is the task's XCom ``dstack_run_url``. Source: Airflow documentation, "Define an operator
    extra link".
    """

    name = "dstack run"

    @property
    def xcom_key(self) -> str:
        """Return the key under which the operator itself puts the address, long before the task ends."""
        return RUN_URL_KEY

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Return the address, or an empty text as long as there is no run."""
        return _pushed(ti_key, RUN_URL_KEY)


class DstackServiceLink(BaseOperatorLink):
    """A link to the service that the run serves; live once it answers.

    The address is the task's XCom ``dstack_service_url``.
    """

    name = "dstack service"

    @property
    def xcom_key(self) -> str:
        """Return the key under which the operator itself puts the address, before the task ends."""
        return SERVICE_URL_KEY

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Return the address, or an empty text as long as the service does not answer."""
        return _pushed(ti_key, SERVICE_URL_KEY)


def push(ti: Any, key: str, value: str, log: Any) -> None:
    """Put an address where its link finds it; if this fails, the run is followed without its link."""
    try:
        ti.xcom_push(key=key, value=value)
    except Exception as error:
        log.warning("Could not write the XCom %s: %r.", key, error)


def _pushed(ti_key: Any, key: str) -> str:
    from airflow.sdk.execution_time.xcom import XCom

    return str(XCom.get_value(ti_key=ti_key, key=key) or "")
