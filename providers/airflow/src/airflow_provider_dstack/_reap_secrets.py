"""Find the project secrets that tasks set and whose DAG run has ended, and delete them.

Their names hold the DAG run; any other secret, also one that was set with ``keep=True``, is left out. The
rules are those for fleets. All questions are asked before the first deletion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._reap_fleets import FleetFinding, describe_fleet, fleet_failure, reap_fleets
from airflow_provider_dstack._resource_verdicts import Action, deletion_failure, judge
from airflow_provider_dstack._secret_owners import owner_of_secret

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import TaskFacts, TaskInstanceLike
    from dstack_core import Client


@dataclass(frozen=True, slots=True)
class SecretFinding:
    """One project secret of a DAG run: whose it is, and what was done about it.

    ``dag_run`` is ``dag/run``; ``state`` is its state, ``"unknown"`` if this Airflow has no such DAG run.
    """

    secret_name: str
    dag_run: str
    state: str
    action: Action
    reason: str


def reap_resources(
    client: Client,
    ask: Callable[[TaskInstanceLike], TaskFacts | None],
    *,
    dry_run: bool,
    stop_unknown: bool,
    log: Any,
) -> list[FleetFinding | SecretFinding]:
    """Delete the fleets and the secrets whose DAG run has ended, and return what was found.

    Raises as ``reap_fleets`` and ``reap_secrets`` do.
    """
    fleets = reap_fleets(client, ask, dry_run=dry_run, stop_unknown=stop_unknown, log=log)
    secrets = reap_secrets(client, ask, dry_run=dry_run, stop_unknown=stop_unknown, log=log)
    return [*fleets, *secrets]


def describe_resource(finding: FleetFinding | SecretFinding) -> str:
    """Return a finding as one line for a person."""
    return describe_fleet(finding) if isinstance(finding, FleetFinding) else describe_secret(finding)


def resource_failures(findings: Sequence[FleetFinding | SecretFinding]) -> list[str]:
    """Return a message about the fleets, and one about the secrets, that could not be deleted."""
    fleets = fleet_failure([one for one in findings if isinstance(one, FleetFinding)])
    secrets = secret_failure([one for one in findings if isinstance(one, SecretFinding)])
    return [one for one in (fleets, secrets) if one is not None]


def reap_secrets(
    client: Client,
    ask: Callable[[TaskInstanceLike], TaskFacts | None],
    *,
    dry_run: bool,
    stop_unknown: bool,
    log: Any,
) -> list[SecretFinding]:
    """Delete the secrets whose DAG run has ended, and return what was found.

    Raises dstack's server errors, and ``DstackError`` when Airflow does not answer, in both cases before
    anything is deleted. A secret that could not be deleted is a finding, not an error.
    """
    found = []
    for name in _names(client):
        owner = owner_of_secret(name)
        if owner is not None:
            verdict = judge(owner, ask, kind="secret", stop_unknown=stop_unknown)
            action = verdict.action(dry_run=dry_run)
            dag_run = f"{owner.dag_id}/{owner.run_id}"
            found.append(SecretFinding(name, dag_run, verdict.state, action, verdict.reason))
    findings = [_delete(client, one) if one.action == "deleted" else one for one in found]
    for finding in findings:
        log.info("%s", describe_secret(finding))
    return findings


def describe_secret(finding: SecretFinding) -> str:
    """Return a finding as one line for a person."""
    return (
        f"{finding.action.capitalize()}: project secret {finding.secret_name} of {finding.dag_run} "
        f"(DAG run {finding.state}): {finding.reason}"
    )


def secret_failure(findings: Sequence[SecretFinding]) -> str | None:
    """Return one message about the secrets that could not be deleted, None when there are none."""
    failed = [(one.secret_name, one.reason) for one in findings if one.action == "not deleted"]
    return deletion_failure(failed, "these project secrets")


def _names(client: Client) -> list[str]:
    from dstack_core import AccessDeniedError, UnsupportedServerError

    try:
        return [secret.name for secret in client.secrets.list()]
    except (UnsupportedServerError, AccessDeniedError):
        # A user who may not manage secrets has set none.
        return []


def _delete(client: Client, finding: SecretFinding) -> SecretFinding:
    from dstack_core import DstackError as CoreError

    try:
        client.secrets.delete(finding.secret_name)
    except CoreError as error:
        return replace(finding, action="not deleted", reason=error.message)
    return finding
