"""The users, projects and backends of a server."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class User:
    """A user of the server, without token and keys.

    Attributes:
        id: The user's id (a UUID).
        name: The user's name.
        global_role: The server's word: ``"admin"`` or ``"user"``.
        email: The user's address, or None.
        created_at: When the user was created (aware); None from servers that do not return it.

    Source: PROTOCOL 1.2.
    """

    id: str
    name: str
    global_role: str
    email: str | None = None
    created_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class ProjectMember:
    """A member of a project; ``role`` is the server's word: ``"admin"``, ``"manager"`` or ``"user"``."""

    user: User
    role: str


@dataclass(frozen=True, slots=True)
class Backend:
    """A backend from which a project can get machines, without credentials.

    Attributes:
        name: The name that ``backends=`` of a run takes, such as ``aws``.
        type: The server's word for the kind.
    """

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class Project:
    """A project of the server.

    Attributes:
        name: The project's name.
        id: The project's id (a UUID).
        owner: The user who owns it.
        backends: Its backends; ``projects.get`` returns them, in a list servers leave them out.
        members: Its members; the same holds for them.
        is_public: Whether the project is public.
        created_at: When it was created (aware), or None.

    Source: PROTOCOL 1.2.
    """

    name: str
    id: str
    owner: User
    backends: tuple[Backend, ...] = ()
    members: tuple[ProjectMember, ...] = ()
    is_public: bool = False
    created_at: datetime | None = None
