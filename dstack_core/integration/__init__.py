"""What a workflow engine needs on top of a client, written once for all of them.

An adapter for another engine is built from this package and the clients; see the Airflow provider and the
Prefect collection for two that are.
"""

from __future__ import annotations

from dstack_core.integration.stop import astop_run, describe_stop, stop_run
from dstack_core.models.stops import RunRef, StopResult, StopState

__all__ = ["RunRef", "StopResult", "StopState", "astop_run", "describe_stop", "stop_run"]
