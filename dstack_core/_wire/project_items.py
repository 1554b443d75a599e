"""The calls for a project's volumes, secrets and gateways, and how their replies are read (PROTOCOL 1.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dstack_core._wire.api import Api, none_when_missing
from dstack_core._wire.http_messages import Call, time_of
from dstack_core._wire.spec import keys_that_were_set
from dstack_core.models.account import Gateway, Secret
from dstack_core.models.volumes import Volume, VolumeConfiguration

_GB = 2**30


@dataclass(frozen=True, slots=True)
class ProjectItemsApi:
    """The calls for volumes, secrets and gateways of a project."""

    api: Api

    def get_volume(self, name: str) -> Call[Volume | None]:
        """Ask for the volume of that name; None when it is missing or deleted."""
        return none_when_missing(self.api.call(self.api.path("volumes/get"), {"name": name}, parse_volume))

    def list_volumes(self) -> Call[list[Volume]]:
        """Ask for the project's volumes."""
        return self.api.call(
            self.api.path("volumes/list"), {}, lambda data: [parse_volume(item) for item in data]
        )

    def create_volume(self, configuration: Mapping[str, Any]) -> Call[Volume]:
        """Create a volume; refused if its name is taken."""
        body = {"configuration": configuration}
        return self.api.call(self.api.path("volumes/create"), body, parse_volume, idempotent=False)

    def delete_volume(self, name: str) -> Call[None]:
        """Ask to delete a volume; a missing one is fine."""
        return self.api.call(self.api.path("volumes/delete"), {"names": [name]}, lambda _: None)

    def list_secrets(self) -> Call[list[Secret]]:
        """Ask for the names of the project's secrets."""
        return self.api.call(
            self.api.path("secrets/list"), {}, lambda data: [_parse_secret(item) for item in data]
        )

    def set_secret(self, name: str, value: str) -> Call[Secret]:
        """Create a secret or replace its value; the same value twice does no more than once."""
        body = {"name": name, "value": value}
        return self.api.call(self.api.path("secrets/create_or_update"), body, _parse_secret)

    def delete_secret(self, name: str) -> Call[bool]:
        """Ask to delete a secret; False if the project has no such secret."""
        path = self.api.path("secrets/delete")
        done = none_when_missing(self.api.call(path, {"secrets_names": [name]}, lambda _: True))
        return Call(done.request, lambda reply: done.parse(reply) is True, place=done.place)

    def list_gateways(self) -> Call[list[Gateway]]:
        """Ask for the project's gateways."""
        return self.api.call(
            self.api.path("gateways/list"), {}, lambda data: [_parse_gateway(item) for item in data]
        )

    def get_gateway(self, name: str) -> Call[Gateway | None]:
        """Ask for the gateway of that name; None when it is missing."""
        path = self.api.path("gateways/get")
        return none_when_missing(self.api.call(path, {"name": name}, _parse_gateway))


def volume_configuration(configuration: VolumeConfiguration, name: str) -> dict[str, Any]:
    """Return the configuration of a volume as it is sent."""
    return {**keys_that_were_set(configuration), "name": name}


def parse_volume(data: Mapping[str, Any]) -> Volume:
    """Read one volume; every field but id, name, status and time is optional."""
    configuration = data.get("configuration") or {}
    provisioned = data.get("provisioning_data") or {}
    size = provisioned.get("size_gb") or configuration.get("size")
    cost, price = data.get("cost"), provisioned.get("price")
    return Volume(
        id=str(data["id"]),
        name=data["name"],
        project=data["project_name"],
        status=str(data["status"]),
        created_at=time_of(data["created_at"]),
        status_message=data.get("status_message"),
        backend=configuration.get("backend"),
        region=configuration.get("region"),
        size=round(size * _GB) if isinstance(size, int | float) else None,
        external=bool(data.get("external")),
        attached_to=tuple(_machine(item) for item in data.get("attachments") or ()),
        cost=None if cost is None else float(cost),
        price_per_month=None if price is None else float(price),
        tags=dict(configuration.get("tags") or {}),
        configuration=dict(configuration),
    )


def _machine(attachment: Mapping[str, Any]) -> str:
    return str((attachment.get("instance") or {}).get("name") or "")


def _parse_secret(data: Mapping[str, Any]) -> Secret:
    # Some replies have the value, too, which nothing here may keep.
    return Secret(name=data["name"], id=str(data["id"]))


def _parse_gateway(data: Mapping[str, Any]) -> Gateway:
    configuration = data.get("configuration") or {}
    return Gateway(
        name=data["name"],
        id=str(data.get("id") or ""),
        project=data.get("project_name") or "",
        status=str(data.get("status") or ""),
        status_message=data.get("status_message"),
        created_at=time_of(data["created_at"]) if data.get("created_at") else None,
        backend=data.get("backend") or configuration.get("backend"),
        region=data.get("region") or configuration.get("region"),
        hostname=data.get("hostname") or data.get("ip_address"),
        domain=data.get("wildcard_domain"),
        is_default=bool(data.get("default")),
    )
