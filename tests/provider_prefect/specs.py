"""Read back from a dstack server what a run was submitted with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import requests

from dstack_core.local import LocalServer
from tests.core.repos import clone_pair, git

REMOTE = "https://github.com/team/private.git"


def ask(server: LocalServer, path: str, **body: Any) -> Any:
    """Return the server's reply to a request for the project."""
    reply = requests.post(
        f"{server.url}/api/project/{server.project}/{path}",
        json=body,
        headers={"Authorization": f"Bearer {server.token}"},
        timeout=10,
    )
    reply.raise_for_status()
    return reply.json()


def specs(server: LocalServer) -> list[dict[str, Any]]:
    """Return the specifications of all runs, oldest first."""
    with server.client() as client:
        names = [run.name for run in client.runs.list(all=True)][::-1]
    return [ask(server, "runs/get", run_name=name)["run_spec"] for name in names]


def git_login(server: LocalServer, spec: dict[str, Any]) -> dict[str, Any]:
    """Return the credentials that the server has for the repository of a run."""
    found = ask(server, "repos/get", repo_id=spec["repo_id"], include_creds=True)
    return dict(found["repo_creds"])


def private_checkout(folder: Path) -> Path:
    """Return a Git checkout whose remote is private."""
    folder.mkdir(parents=True, exist_ok=True)
    work = clone_pair(folder)
    git(work, "remote", "set-url", "origin", REMOTE)
    return work
