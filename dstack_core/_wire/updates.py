"""Update an active run in place: what would change, and what cannot (PROTOCOL 1.4).

An update is a ``runs/apply`` that names the run as the caller last saw it. The server refuses it if the run
has changed since, so of two updates at the same time one wins, and a request that arrives twice changes
nothing twice.

``effective_run_spec`` in the reply of ``runs/get_plan`` is the spec as it would be stored, so comparing it
with the stored one shows what would change, and after a lost reply whether the update arrived. Whether a
change needs a new run is the server's to decide; the lists here only name the changes in the error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dstack_core._wire.runs import RunSnapshot, parse_run

# What 0.22.5 changes without a new run, by the type of the configuration; a replica is replaced where it must
# be. Older servers change less, as the plan's `action` shows; then each change is named in the error.
_IN_CONFIGURATION: Mapping[str, frozenset[str]] = {
    "task": frozenset({"priority"}),
    "dev-environment": frozenset({"priority", "inactivity_duration"}),
    "service": frozenset({
        "commands", "docker", "entrypoint", "env", "files", "gateway", "groups", "image", "nvcc", "port",
        "priority", "privileged", "probes", "python", "replicas", "resources", "scaling", "shell",
        "single_branch", "user", "volumes", "working_dir",
    }),
}  # fmt: skip


_IN_SPEC: Mapping[str, frozenset[str]] = {
    "service": frozenset({"repo_data", "repo_code_hash", "file_archives", "working_dir"})
}


_MARKER = "configuration_path"


# What an error calls the keys of a run spec that are not keys of a configuration.
_IN_WORDS = {
    "repo_id": "the repository",
    "repo_data": "the commit",
    "repo_code_hash": "the uploaded code",
    "file_archives": "the contents of files",
    "ssh_key_pub": "the SSH key",
}


@dataclass(frozen=True, slots=True)
class Resource:
    """A run, and the reply it was read from, which contains the values of environment variables."""

    run: RunSnapshot
    data: Mapping[str, Any] = field(repr=False)

    @property
    def spec(self) -> Mapping[str, Any]:
        """Return the run spec as the server keeps it."""
        spec: Mapping[str, Any] = self.data["run_spec"]
        return spec

    @property
    def is_ending(self) -> bool:
        """Return whether the run is active but being stopped."""
        return self.run.status.is_stopping


@dataclass(frozen=True, slots=True)
class UpdatePlan:
    """The effect of an apply on the run of that name, if there is one.

    ``effective`` is the run spec with the server's defaults. ``is_possible``: whether the server would
    update the run in place; None where it does not report that, before 0.19.
    """

    current: Resource | None
    effective: Mapping[str, Any] = field(repr=False)
    is_possible: bool | None

    @property
    def changes_nothing(self) -> bool:
        """Return whether the run already has the wanted spec, its marker included."""
        return self.current is not None and not self._changed()

    @property
    def blocking(self) -> tuple[str, ...]:
        """Return the changes that need a new run, in words; all of them where none is known to."""
        changed = [key for key in self._changed() if key != _MARKER]
        kind = str(self.effective["configuration"].get("type"))
        fine = {*_IN_SPEC.get(kind, ()), *(f"configuration.{key}" for key in _IN_CONFIGURATION.get(kind, ()))}
        blocking = [key for key in changed if key not in fine] or changed
        return tuple(_IN_WORDS.get(key, key.removeprefix("configuration.")) for key in blocking)

    def _changed(self) -> list[str]:
        return [] if self.current is None else list(_differing(self.current.spec, self.effective))


def parse_resource(data: Mapping[str, Any]) -> Resource:
    """Read the reply of ``runs/get``."""
    return Resource(parse_run(data), data)


def parse_update_plan(data: Mapping[str, Any]) -> UpdatePlan:
    """Read the reply of ``runs/get_plan`` for its effect on an active run."""
    current, action = data.get("current_resource"), data.get("action")
    return UpdatePlan(
        None if current is None else parse_resource(current),
        data.get("effective_run_spec") or data["run_spec"],
        None if action is None or not data.get("effective_run_spec") else action == "update",
    )


def update_of(current: Resource, run_spec: Mapping[str, Any], *, marker: str | None) -> dict[str, Any]:
    """Return the spec that updates a run to ``run_spec``; without a ``marker`` it keeps its own.

    dstack's client writes the name into the configuration, too, where it cannot be changed: a name that is
    there stays.
    """
    kept = current.spec.get(_MARKER) if marker is None else marker
    configuration = dict(run_spec["configuration"])
    name = (current.spec.get("configuration") or {}).get("name")
    if name is not None:
        configuration["name"] = name
    return {**run_spec, _MARKER: kept, "configuration": configuration}


def same_spec(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two run specs, as a server keeps them, are the same."""
    return not list(_differing(one, other))


def _differing(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted(old.keys() | new.keys()):
        # A missing key and null mean the same in a stored spec.
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if key in ("configuration", "profile") and isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differing(before, after, f"{key}.")
        else:
            yield f"{prefix}{key}"
