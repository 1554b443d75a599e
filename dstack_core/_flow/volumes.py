"""Create network volumes exactly once, and wait for them (PROTOCOL 1.2).

A volume has no place for a marker: ``volumes/create`` takes a configuration and nothing else. So its owner is
known by its name, and from 0.19.5 on by its tags. As for fleets, the volume of that name is fetched before a
request and after each refused, lost or malformed reply; the server refuses a name that is taken. A volume is
never changed: one that exists in another place, or with other tags, is not the wanted one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstack_core._flow.fleets import PAUSE_SECONDS
from dstack_core._flow.retry import Patience, RetryBudget
from dstack_core._flow.steps import Op, Sleep, call
from dstack_core._flow.submit import SETTLE_SECONDS
from dstack_core._wire.project_items import ProjectItemsApi
from dstack_core.errors import (
    ProtocolError,
    RequestRejectedError,
    ResourceFailedError,
    ResourceNameTakenError,
    TransientServerError,
)
from dstack_core.models.volumes import Volume

# What must be the same for a volume to be the wanted one. The rest may have been filled in by the server.
_SAME = ("backend", "region", "availability_zone", "volume_id", "tags")


def apply_volume(api: ProjectItemsApi, configuration: Mapping[str, Any], budget: RetryBudget) -> Op[Volume]:
    """Return the volume of that name; create it if it is missing. Raises ``ResourceNameTakenError``."""
    patience = Patience(budget)
    refusal: RequestRejectedError | None = None
    while True:
        found = yield from call(api.get_volume(configuration["name"]))
        if found is not None:
            different = [
                key
                for key in _SAME
                if configuration.get(key) and configuration[key] != found.configuration.get(key)
            ]
            if different:
                raise _taken(api, found, different)
            return found
        if refusal is not None:
            raise refusal
        try:
            return (yield from call(api.create_volume(configuration)))
        except RequestRejectedError as error:
            refusal = error
        except (TransientServerError, ProtocolError) as error:
            yield Sleep(max(patience.after(error), SETTLE_SECONDS))


def wait_until_active(api: ProjectItemsApi, name: str) -> Op[Volume]:
    """Wait until runs can mount the volume. Raises ``ResourceFailedError`` for one that failed or is gone."""
    while True:
        found = yield from call(api.get_volume(name))
        if found is None:
            raise ResourceFailedError(
                f"Volume {name} is no longer in project {api.api.project} on {api.api.server_url}. "
                "Find out what deleted it, and create it again."
            )
        if found.is_active:
            return found
        if found.has_failed:
            reason = found.status_message or "the server reports no reason"
            raise ResourceFailedError(
                f"Volume {name} could not be created: {reason}. Correct its configuration, delete it and "
                "create it again."
            )
        yield Sleep(PAUSE_SECONDS)


def delete_volume(api: ProjectItemsApi, name: str, *, until_deleted: bool) -> Op[bool]:
    """Delete a volume with its data; return whether there was one."""
    found = yield from call(api.get_volume(name))
    if found is None:
        return False
    yield from call(api.delete_volume(name))
    while until_deleted:
        now = yield from call(api.get_volume(name))
        if now is None or now.id != found.id:
            break
        yield Sleep(PAUSE_SECONDS)
    return True


def _taken(api: ProjectItemsApi, found: Volume, different: list[str]) -> ResourceNameTakenError:
    shown = " and ".join(_own(key, found.configuration.get(key)) for key in different)
    return ResourceNameTakenError(
        f"name: expected a volume name that is free, got {found.name!r}: a volume of that name has {shown} "
        f"in project {found.project} on {api.api.server_url}. Choose another name, or use that volume as it "
        "is."
    )


def _own(key: str, value: Any) -> str:
    """Return what another volume has; its tags are hashes of an engine's, which mean nothing to a reader."""
    if key == "tags":
        return "other tags" if value else "no tags"
    name = key.replace("_", " ")
    return f"no {name}" if value in (None, "") else f"{name} {value!r}"
