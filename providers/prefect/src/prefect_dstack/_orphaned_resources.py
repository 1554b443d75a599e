"""Find and delete the fleets and secrets that a flow run left behind: for the hooks and the reaper.

As with runs (``_orphaned_runs``), the marker on a fleet names its flow run or task run. A fleet is deleted
once its owner has ended and no run uses it: servers refuse to delete one that runs use. A fleet is left while
a run of its owner is left, such as one with ``on_crash="keep"`` that still waits for a machine of it. Fleets
with ``keep=True`` have no owner.

The name of a project secret of ``sync_secrets`` holds its owner. Servers before 0.19.17 have no secrets.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from prefect_dstack._judge import UNKNOWN_STATE, Finding, Judge
from prefect_dstack._names import flow_run_marker_prefix, outlives_crash, owner_of
from prefect_dstack._resource_names import owner_of_secret

if TYPE_CHECKING:
    from dstack_core import Client, Fleet

# How long a fleet's runs, which were stopped before, may need to end. What needs longer is the next pass's.
_IN_USE_SECONDS = 30.0
_KINDS = ("flow_run", "task_run")
_IN_USE = "in use"


def delete_left_over(client: Client, prefixes: tuple[str, ...], logger: Any, *, crashed: bool) -> None:
    """Delete the fleets of a flow run and its subflows, whose markers begin with ``prefixes``.

    After a crash they are left if a run submitted with ``on_crash="keep"`` is active. An error is logged.
    """
    _delete_secrets(client, prefixes, logger)
    try:
        fleets = [one for one in _present(client) if (one.marker or "").startswith(prefixes)]
        if not fleets:
            return
        if crashed and (kept := _kept_run(client, prefixes)):
            for fleet in fleets:
                logger.info("Fleet %s is left for run %s, which is kept.", fleet.name, kept)
            return
    except Exception as error:
        logger.warning("Could not get the fleets of this flow run: %s", error)
        return
    for fleet in fleets:
        try:
            _delete(client, fleet)
            logger.info("Fleet %s is being deleted.", fleet.name)
        except Exception as error:
            logger.warning("Fleet %s could not be deleted: %s", fleet.name, error)


def reap_resources(
    client: Client, judge: Judge, runs: Iterable[Finding], *, dry_run: bool
) -> list[tuple[str, Finding]]:
    """Delete the fleets whose owner has ended; return their ids and what was found.

    ``runs`` are the findings about active runs. Raises the server errors of the list of fleets.
    """
    runs = list(runs)
    left = {found.owner: found.run_name for found in runs if not found.stopped}
    # A flow run whose runs were stopped has no process that still needs a fleet.
    lost = {found.owner for found in runs if found.stopped}
    found = []
    for fleet in _present(client):
        kind, owner_id = owner_of(fleet.marker) or ("", "")
        if kind not in _KINDS:
            continue
        finding = _judged(fleet.name, judge, kind, owner_id, left, lost, url=client.fleet_url(fleet.id))
        if finding.stopped and not dry_run:
            finding = _deleted(client, fleet, finding)
        found.append((fleet.id, finding))
    for name in _secret_names(client):
        kind, owner_id = owner_of_secret(name) or ("", "")
        if kind in _KINDS:
            finding = _judged(name, judge, kind, owner_id, left, lost, url="", what="secret")
            if finding.stopped and not dry_run:
                client.secrets.delete(name)
            found.append((name, finding))
    return found


def _judged(
    resource: str,
    judge: Judge,
    kind: str,
    owner_id: str,
    left: dict[str, str],
    lost: Collection[str],
    *,
    url: str,
    what: str = "fleet",
) -> Finding:
    state = judge.state(kind, owner_id)
    deleted, reason = judge.owner_verdict(kind, state)
    owner = f"{kind}/{owner_id}"
    if deleted and owner in left:
        deleted, reason = False, f"run {left[owner]} of its {kind.replace('_', ' ')} is left"
    elif deleted and kind == "flow_run" and owner not in lost and judge.lets_tasks_finish(owner_id, state):
        deleted, reason = False, "a task of its flow run still runs"
    name = UNKNOWN_STATE if state is None else str(state.name)
    return Finding(resource, url, owner, name, deleted, reason, kind=what)


def _deleted(client: Client, fleet: Fleet, finding: Finding) -> Finding:
    from dstack_core import DstackError

    try:
        _delete(client, fleet)
    except DstackError as error:
        # Its runs have not ended yet, or others than those of its owner use it.
        if _IN_USE in str(error) or type(error).__name__ == "WaitTimeoutError":
            return replace(finding, stopped=False, reason=f"{finding.reason}; runs still use it")
        return replace(finding, stopped=False, failed=True, reason=f"{finding.reason}; {error}")
    return finding


def _delete(client: Client, fleet: Fleet) -> None:
    client.fleets.delete(fleet.name, marker=fleet.marker, wait_for_runs=True, timeout=_IN_USE_SECONDS)


def _present(client: Client) -> Collection[Fleet]:
    return [one for one in client.fleets.list() if not one.has_ended and not one.is_terminating]


def _secret_names(client: Client) -> list[str]:
    from dstack_core import AccessDeniedError, UnsupportedServerError

    try:
        return [secret.name for secret in client.secrets.list()]
    except (UnsupportedServerError, AccessDeniedError):
        # Who may not manage secrets has set none.
        return []


def _delete_secrets(client: Client, prefixes: tuple[str, ...], logger: Any) -> None:
    try:
        for name in _secret_names(client):
            kind, owner_id = owner_of_secret(name) or ("", "")
            if kind == "flow_run" and flow_run_marker_prefix(owner_id) in prefixes:
                client.secrets.delete(name)
                logger.info("Project secret %s is deleted.", name)
    except Exception as error:
        logger.warning("Could not delete the project secrets of this flow run: %s", error)


def _kept_run(client: Client, prefixes: tuple[str, ...]) -> str | None:
    for run in client.runs.list():
        marker = run.marker or ""
        if marker.startswith(prefixes) and outlives_crash(marker) and not run.last_status.is_finished:
            return run.name
    return None
