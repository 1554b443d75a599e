"""The names of what a flow run creates beside runs: fleets with their markers, and project secrets.

A project secret has no marker, so its name holds the owner: ``prefect_f_<flow run>_<number>_<variable>``.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect_dstack._names import Ordinals, Owner, calling_owner, marker_prefix

if TYPE_CHECKING:
    from dstack_core.integration import RunRef

# As that of a run: machines of a fleet add a number.
_LONGEST_NAME = 37
_KINDS = {"f": "flow_run", "t": "task_run"}
_SECRET = re.compile(r"prefect_([a-z])_([0-9a-f]{32})_\w+")
_ordinals = Ordinals()


def resource_owner(block: str, what: str) -> Owner:
    """Return the flow or task that enters a ``with`` of that name; ``what`` describes what it creates.

    Raises ``ConfigurationError`` outside of one: after a kill no hook and no reaper could know that what is
    left has no owner any more, and a fleet costs money.
    """
    from dstack_core import ConfigurationError

    owner = calling_owner(what)
    if not owner.is_tracked:
        raise ConfigurationError(
            f"{block}: expected a flow or a task, got code outside of one, of which nothing could be deleted "
            "if its process died. Use it in a @flow. A thread that a flow starts is outside, too: run its "
            "function with contextvars.copy_context().run, or make it a @task and call .submit()."
        )
    return owner


def identify_resource(
    owner: Owner,
    kind: str,
    spec: dict[str, Any],
    *,
    name: str | None = None,
    prefix: str | None = None,
    ordinals: Ordinals = _ordinals,
) -> RunRef:
    """Return the name and marker of a fleet (``kind``) that ``owner`` creates from ``spec``."""
    from dstack_core.integration import RunRef, short_hash
    from dstack_core.integration import run_name as readable_name

    fingerprint = short_hash(json.dumps([spec, kind, name], sort_keys=True, default=str), 6)
    marker = f"{marker_prefix(owner)}{kind}/{fingerprint}-{ordinals.ordinal(owner, fingerprint)}/1"
    generated = readable_name([owner.flow_name, prefix or kind], marker, longest=_LONGEST_NAME)
    return RunRef(name or generated, marker, generated=name is None)


def identify_secret(owner: Owner, variable: str, *, ordinals: Ordinals = _ordinals) -> str:
    """Return the name of the project secret that ``owner`` sets for a variable."""
    kind = "f" if owner.flow_run_id else "t" if owner.is_tracked else "s"
    owner_id = UUID(owner.flow_run_id or owner.task_run_id).hex
    # References of dstack have no hyphens.
    number = ordinals.ordinal(owner, f"secret {variable}").replace("-", "_")
    return f"prefect_{kind}_{owner_id}_{number}_{variable}"


def owner_of_secret(name: str) -> tuple[str, str] | None:
    """Return the kind and id of the owner of a project secret; None for any other name."""
    found = _SECRET.fullmatch(name)
    if found is None or found[1] not in _KINDS:
        return None
    return _KINDS[found[1]], str(UUID(found[2]))
