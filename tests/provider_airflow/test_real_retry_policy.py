"""A retry policy in a real Airflow: it decides by the category of the failure whether a task is tried again."""

from __future__ import annotations

import pytest

from airflow_provider_dstack._compat import has_retry_policies
from dstack_core.local import LocalServer
from tests.provider_airflow.components import Components
from tests.provider_airflow.support import runs_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.matrix,
    pytest.mark.skipif(not has_retry_policies(), reason="Airflow has retry policies since 3.3"),
]


def decisions(components: Components, dag_id: str, dag_run: str, tries: int) -> list[tuple[str, str]]:
    """Return what the policy decided after each try, from the tries' logs."""
    logs = [components.log(dag_id, dag_run, number) for number in range(1, tries + 1)]
    records = [one for log in logs for one in log if isinstance(one, dict)]
    return [(one["action"], one["reason"]) for one in records if one.get("event") == "Retry policy decision"]


def test_a_missing_machine_is_tried_again_and_a_wrong_command_is_not(
    components: Components, shared_server: LocalServer
) -> None:
    # Both tasks have two retries.
    dag_runs = {dag_id: components.trigger(dag_id) for dag_id in ("policy_user", "policy_capacity")}
    runs = {}
    found = {}
    for dag_id, dag_run in dag_runs.items():
        components.wait_for_run_end(dag_id, dag_run, 240)
        task = components.task(dag_id, dag_run)
        assert task["state"] == "failed"
        runs[dag_id] = runs_of(shared_server, f"airflow:{dag_id}/{dag_run}/")
        found[dag_id] = decisions(components, dag_id, dag_run, task["try_number"])
    # A process of Airflow that a busy machine ends costs a try without a run.
    assert len(runs["policy_user"]) == 1
    assert found["policy_user"] == [("fail", "dstack: user.exit is not retried")]
    assert len(runs["policy_capacity"]) > 1
    assert {action for action, reason in found["policy_capacity"]} == {"retry"}
    assert all(reason.startswith("dstack: capacity.") for action, reason in found["policy_capacity"])
