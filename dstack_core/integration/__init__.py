"""What a workflow engine needs on top of a client, written once for all of them.

An adapter for another engine is built from this package and the clients; see the Airflow provider and the
Prefect collection for two that are.
"""

from __future__ import annotations

from dstack_core.integration.attempts import Attempt, AttemptNames, achoose_attempt, choose_attempt
from dstack_core.integration.ends import check_ends
from dstack_core.integration.masking import Masker, collect_secrets, mask
from dstack_core.integration.relay import DEFAULT_LOG_BUDGET, LogRelay, RecordLimits
from dstack_core.integration.stop import astop_run, describe_stop, stop_run
from dstack_core.models.stops import RunRef, StopResult, StopState
from dstack_core.models.tolerant import known_fields

__all__ = [
    "DEFAULT_LOG_BUDGET",
    "Attempt",
    "AttemptNames",
    "LogRelay",
    "Masker",
    "RecordLimits",
    "RunRef",
    "StopResult",
    "StopState",
    "achoose_attempt",
    "astop_run",
    "check_ends",
    "choose_attempt",
    "collect_secrets",
    "describe_stop",
    "known_fields",
    "mask",
    "stop_run",
]
