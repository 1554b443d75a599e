"""Read events, metrics, users and projects (PROTOCOL 1.2, 1.9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from dstack_core.models.account import Backend, Project, ProjectMember, User
from dstack_core.models.records import EventRecord, Metric


def parse_events(data: Sequence[Mapping[str, Any]]) -> list[EventRecord]:
    """Read one page of events, in the server's order."""
    return [
        EventRecord(
            id=item["id"],
            message=item["message"],
            recorded_at=datetime.fromisoformat(item["recorded_at"]),
            actor=item.get("actor_user"),
            targets=tuple(dict(target) for target in item.get("targets") or []),
        )
        for item in data
    ]


def parse_metrics(data: Mapping[str, Any], *, node: int = 0, replica: int = 0) -> list[Metric]:
    """Read the metrics of that job, each with its oldest value first."""
    return [_metric(item, node, replica) for item in data["metrics"]]


def _metric(data: Mapping[str, Any], node: int, replica: int) -> Metric:
    # Servers send the newest value first; here the oldest comes first, as in the list of events.
    moments = [datetime.fromisoformat(text) for text in data["timestamps"]]
    points = sorted(zip(moments, data["values"], strict=True), key=lambda point: point[0])
    return Metric(
        name=data["name"],
        timestamps=tuple(moment for moment, _ in points),
        values=tuple(float(value) for _, value in points),
        node=node,
        replica=replica,
    )


def parse_user(data: Mapping[str, Any]) -> User:
    """Read one user; every field but id and name is optional."""
    return User(
        id=data["id"],
        name=data["username"],
        global_role=data.get("global_role") or "",
        email=data.get("email"),
        created_at=_moment(data),
    )


def parse_project(data: Mapping[str, Any]) -> Project:
    """Read one project, with members and backends where the reply has them."""
    return Project(
        name=data["project_name"],
        id=data["project_id"],
        owner=parse_user(data["owner"]),
        backends=tuple(_backend(item) for item in data.get("backends") or []),
        members=tuple(
            ProjectMember(parse_user(item["user"]), item.get("project_role") or "")
            for item in data.get("members") or []
        ),
        is_public=bool(data.get("is_public")),
        created_at=_moment(data),
    )


def _backend(data: Mapping[str, Any]) -> Backend:
    # Without a configuration, the name stands for the type.
    return Backend(data["name"], (data.get("config") or {}).get("type") or data["name"])


def _moment(data: Mapping[str, Any]) -> datetime | None:
    return datetime.fromisoformat(data["created_at"]) if data.get("created_at") else None
