"""Read users, projects and backends (PROTOCOL 1.2); tokens and keys are left where they are."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from dstack_core.models.account import Backend, Project, ProjectMember, User


def parse_user(data: Mapping[str, Any]) -> User:
    """Read one user."""
    return User(
        id=data["id"],
        name=data["username"],
        global_role=data.get("global_role") or "",
        email=data.get("email"),
        created_at=_moment(data),
    )


def parse_project(data: Mapping[str, Any]) -> Project:
    """Read one project, with members and backends where they are told."""
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
    return Backend(data["name"], (data.get("config") or {}).get("type") or data["name"])


def _moment(data: Mapping[str, Any]) -> datetime | None:
    return datetime.fromisoformat(data["created_at"]) if data.get("created_at") else None
