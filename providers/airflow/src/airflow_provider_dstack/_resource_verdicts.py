"""What a reaper does about a fleet or a secret whose name or mark shows its DAG run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from airflow_provider_dstack._names import birth_of
from airflow_provider_dstack.errors import DstackError

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import TaskFacts, TaskInstanceLike
    from airflow_provider_dstack._resource_names import ResourceOwner

Action = Literal["left", "deleted", "would delete", "not deleted"]

_ENDED = frozenset({"success", "failed"})


class Verdict(NamedTuple):
    """Whether to delete a resource, the state of its DAG run (``"unknown"`` without one), and why."""

    deletes: bool
    state: str
    reason: str

    def action(self, *, dry_run: bool) -> Action:
        """Return what a pass does about the resource, as its finding names it."""
        if not self.deletes:
            return "left"
        return "would delete" if dry_run else "deleted"


def judge(
    owner: ResourceOwner,
    ask: Callable[[TaskInstanceLike], TaskFacts | None],
    *,
    kind: str,
    stop_unknown: bool,
) -> Verdict:
    """Return what is to be done about a resource. Raises ``DstackError`` when Airflow does not answer."""
    try:
        facts = ask(owner)
    except Exception as error:
        raise DstackError(
            f"Airflow: expected the state of task instance {owner}, got {type(error).__name__}: {error}. "
            f"No {kind} was deleted. Reap again when Airflow answers."
        ) from error
    if facts is None:
        return Verdict(stop_unknown, "unknown", "this Airflow has no such task instance")
    if facts.dag_run_state not in _ENDED:
        return Verdict(False, facts.dag_run_state, "its DAG run has not ended")
    if birth_of(facts.dag_run_started_at) != owner.born:
        reason = "its DAG run has another start: it was cleared since, or it is another Airflow's"
        return Verdict(stop_unknown, facts.dag_run_state, reason)
    return Verdict(True, facts.dag_run_state, "its DAG run has ended")


def deletion_failure(failed: Sequence[tuple[str, str]], these: str) -> str | None:
    """Return one message about resources (name, reason) that could not be deleted, None without any."""
    if not failed:
        return None
    shown = "; ".join(f"{name} ({reason})" for name, reason in failed)
    return (
        f"Reaping: expected every deletion to succeed, got {len(failed)} that failed. Delete {these}: {shown}"
    )
