"""The users, projects, backends, secrets and gateways of a server."""

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


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret of a project; no value is ever read back.

    Attributes:
        name: Its name, which ``${{ secrets.NAME }}`` of a configuration takes.
        id: Its id (a UUID).
    """

    name: str
    id: str


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway, at whose domain services are reached.

    Attributes:
        name: The gateway's name.
        id: Its id (a UUID).
        project: The project it belongs to.
        status: The server's word, such as ``"running"``.
        status_message: Why, in the server's words, or None.
        created_at: When it was created (aware), or None.
        backend, region: Where it is, or None.
        hostname: Its address, or None.
        domain: The domain that services get a name below, or None.
        is_default: Whether services use it without naming it.

    Source: PROTOCOL 1.2.
    """

    name: str
    id: str
    project: str
    status: str
    status_message: str | None = None
    created_at: datetime | None = None
    backend: str | None = None
    region: str | None = None
    hostname: str | None = None
    domain: str | None = None
    is_default: bool = False
