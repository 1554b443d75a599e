"""Who uses a server, and what for: users, projects, backends."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class User:
    """Hold a user of the server; neither a token nor a key is in it.

    ``id`` (a UUID), ``name``, ``global_role`` (the server's word: ``"admin"`` or ``"user"``), ``email``
    (str or None), ``created_at`` (aware; None from servers that do not tell). Source: PROTOCOL 1.2.
    """

    id: str
    name: str
    global_role: str
    email: str | None = None
    created_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class ProjectMember:
    """Hold a member of a project; ``role`` is the server's word: ``"admin"``, ``"manager"``, ``"user"``."""

    user: User
    role: str


@dataclass(frozen=True, slots=True)
class Backend:
    """Hold a backend a project can get machines from, such as ``aws``; no credentials are in it.

    ``name`` is what ``backends=`` of a run takes, ``type`` the server's word for the kind.
    """

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class Project:
    """Hold a project.

    ``name``, ``id`` (a UUID), ``owner`` (``User``), ``is_public`` (bool), ``created_at`` (aware, or None).
    ``backends`` and ``members`` are told by ``projects.get``; of a list, servers leave them out.
    Source: PROTOCOL 1.2.
    """

    name: str
    id: str
    owner: User
    backends: tuple[Backend, ...] = ()
    members: tuple[ProjectMember, ...] = ()
    is_public: bool = False
    created_at: datetime | None = None
