"""What a workflow engine needs on top of a client, written once for all engines.

An adapter for another engine is built from this package and the clients, as the Airflow provider and the
Prefect collection are. A task needs, in this order: names and a marker for its run (``names``), the run of an
earlier execution if there is one (``attempts``), its log (``relay``, ``masking``), its end as text and data
(``outcome_text``), and its stop if the task is stopped (``stop``).
"""

from __future__ import annotations

from dstack_core._code.content import code_digest
from dstack_core._function.call import FunctionCall
from dstack_core._function.result import choose_report, late_read_pauses, report_key
from dstack_core.configurations import check_ends
from dstack_core.integration.attempts import Attempt, achoose_attempt, choose_attempt
from dstack_core.integration.budgets import aread_budget, read_budget
from dstack_core.integration.callbacks import CallbackNotifier
from dstack_core.integration.command_line import COMMAND_RETRY_SECONDS, TextStyle, command_limits
from dstack_core.integration.doctor import examine
from dstack_core.integration.doctor_network import Finding, describe_finding
from dstack_core.integration.fallbacks import Fallbacks, Steps, counted_on
from dstack_core.integration.follow_steps import afollow_steps, anewest_step, follow_steps, newest_step
from dstack_core.integration.host_fallbacks import FALLBACK_OPTIONS, host_fallbacks, refuse_service
from dstack_core.integration.masking import (
    RESULT_WARNING,
    Masker,
    check_mask_env,
    check_masked_names,
    collect_secrets,
    env_names,
    mask,
    mask_progress,
    mask_result,
    mask_value,
)
from dstack_core.integration.names import (
    AttemptNames,
    RunRef,
    make_marker,
    read_marker,
    run_name,
    short_hash,
    slug,
    step_ref,
)
from dstack_core.integration.outcome_text import (
    OUTCOME_FIELDS,
    OutcomeField,
    describe_end,
    describe_failure,
    describe_hold,
    describe_outcome,
    describe_status,
    describe_stop,
    outcome_dict,
    outcome_rows,
    outcome_table,
    raise_for_outcome,
)
from dstack_core.integration.relay import DEFAULT_LOG_BUDGET, LogRelay, RecordLimits, describe_progress
from dstack_core.integration.run_lists import (
    RunRow,
    cost_csv,
    cost_rows,
    cost_table,
    is_held_for_a_shell,
    rows_json,
    run_rows,
    run_table,
    show_costs,
    show_findings,
    show_runs,
)
from dstack_core.integration.step_sums import StepSums
from dstack_core.integration.stop import astop_run, stop_run
from dstack_core.integration.telemetry import trace_env, trace_run, wait_seconds
from dstack_core.integration.utilization_text import (
    describe_utilization,
    utilization_chart,
    utilization_lines,
)
from dstack_core.models.base import known_fields
from dstack_core.models.budgets import BudgetSpentError, BudgetState
from dstack_core.models.cost_limits import check_max_cost
from dstack_core.models.debug import Hold
from dstack_core.models.durations import format_duration
from dstack_core.models.failure_categories import (
    FAILURE_CATEGORIES,
    RETRIED_CATEGORIES,
    FailureCategory,
    category_of,
    check_categories,
    in_categories,
)
from dstack_core.models.fleets import check_machines
from dstack_core.models.money import format_price, format_usd
from dstack_core.models.no_fleet import plan_hints
from dstack_core.models.options import check_address, check_resource_name, hold_seconds
from dstack_core.models.secrets import MaskEnv, is_secret_name
from dstack_core.models.step_markers import split_step
from dstack_core.models.stops import StopResult, StopState
from dstack_core.models.survive import read_survive
from dstack_core.models.tags import check_tags, tag_value

__all__ = [
    "COMMAND_RETRY_SECONDS",
    "DEFAULT_LOG_BUDGET",
    "FAILURE_CATEGORIES",
    "FALLBACK_OPTIONS",
    "OUTCOME_FIELDS",
    "RESULT_WARNING",
    "RETRIED_CATEGORIES",
    "Attempt",
    "AttemptNames",
    "BudgetSpentError",
    "BudgetState",
    "CallbackNotifier",
    "FailureCategory",
    "Fallbacks",
    "Finding",
    "FunctionCall",
    "Hold",
    "LogRelay",
    "MaskEnv",
    "Masker",
    "OutcomeField",
    "RecordLimits",
    "RunRef",
    "RunRow",
    "StepSums",
    "Steps",
    "StopResult",
    "StopState",
    "TextStyle",
    "achoose_attempt",
    "afollow_steps",
    "anewest_step",
    "aread_budget",
    "astop_run",
    "category_of",
    "check_address",
    "check_categories",
    "check_ends",
    "check_machines",
    "check_mask_env",
    "check_masked_names",
    "check_max_cost",
    "check_resource_name",
    "check_tags",
    "choose_attempt",
    "choose_report",
    "code_digest",
    "collect_secrets",
    "command_limits",
    "cost_csv",
    "cost_rows",
    "cost_table",
    "counted_on",
    "describe_end",
    "describe_failure",
    "describe_finding",
    "describe_hold",
    "describe_outcome",
    "describe_progress",
    "describe_status",
    "describe_stop",
    "describe_utilization",
    "env_names",
    "examine",
    "follow_steps",
    "format_duration",
    "format_price",
    "format_usd",
    "hold_seconds",
    "host_fallbacks",
    "in_categories",
    "is_held_for_a_shell",
    "is_secret_name",
    "known_fields",
    "late_read_pauses",
    "make_marker",
    "mask",
    "mask_progress",
    "mask_result",
    "mask_value",
    "newest_step",
    "outcome_dict",
    "outcome_rows",
    "outcome_table",
    "plan_hints",
    "raise_for_outcome",
    "read_budget",
    "read_marker",
    "read_survive",
    "refuse_service",
    "report_key",
    "rows_json",
    "run_name",
    "run_rows",
    "run_table",
    "short_hash",
    "show_costs",
    "show_findings",
    "show_runs",
    "slug",
    "split_step",
    "step_ref",
    "stop_run",
    "tag_value",
    "trace_env",
    "trace_run",
    "utilization_chart",
    "utilization_lines",
    "wait_seconds",
]
