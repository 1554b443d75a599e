"""Updates in place: what a 0.22.5 server can change in an active run without a new run (PROTOCOL 1.4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dstack_core.local.specs import RunSpec

_OF_ANY = frozenset({"configuration_path", "configuration.priority"})
_OF_TYPE = {
    "task": _OF_ANY,
    "dev-environment": _OF_ANY | {"configuration.inactivity_duration"},
    "service": _OF_ANY
    | {"repo_data", "repo_code_hash", "file_archives", "working_dir"}
    | {
        f"configuration.{key}"
        for key in (
            *("replicas", "groups", "scaling", "gateway", "port", "probes", "resources", "volumes", "docker"),
            *("files", "image", "user", "privileged", "entrypoint", "working_dir", "python", "nvcc"),
            *("single_branch", "env", "shell", "commands"),
        )
    },
}


def can_update(old: RunSpec, new: RunSpec) -> bool:
    """Return whether an active run with one spec can be updated to the other."""
    if old.configuration.type != new.configuration.type:
        return False
    changed = set(_changed(old.model_dump(mode="json"), new.model_dump(mode="json")))
    return changed <= _OF_TYPE[new.configuration.type]


def _changed(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for key in old.keys() - {"configuration"}:
        if old[key] != new[key]:
            yield key
    before, after = old["configuration"], new["configuration"]
    for key in before:
        # Whether the default is written or left out does not count as a change.
        if before[key] != after[key] and not (key == "https" and {before[key], after[key]} == {None, True}):
            yield f"configuration.{key}"
