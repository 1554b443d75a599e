"""What a real server reports about a run after a restart, and what it lost of the run on its own."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from tests.faults.case import Ended
from tests.faults.judges import LINES, Life, right_end
from tests.rig.server import RealServer

# The largest page that a server accepts (PROTOCOL 1.8).
_PAGE_LINES = 1000
# An upper bound for a busy machine.
_REQUEST_SECONDS = 30.0


def judge(life: Life, logged: Sequence[str]) -> tuple[str, str]:
    """Return what is wrong, and what the server lost on its own; both are empty if nothing was lost.

    ``logged`` are the lines in the server's own log once the run has ended. If the server has a line twice, the
    second copy may be delivered or not: it is older than what was already read, and whether the server returns it
    depends on the moment of the request.
    """
    flaw = right_end(life)
    if not flaw or len(life.runs) != 1:
        return flaw, ""
    if list(life.ended.lines) != list(logged) and not _only_second_copies_missing(life.ended.lines, logged):
        return f"{flaw}; the server's log holds {_in_words(logged)}", ""
    run = life.runs[0]
    if run["status"] == "failed":
        reason = _reason(run)
        if _reported_failure(life.ended) != reason:
            return f"{flaw}; the server reports {reason}", ""
        return "", f"the server failed the run: {reason}; its log holds {_in_words(logged)}"
    if run["status"] == life.ended.status == "done":
        return "", f"the server's log holds {_in_words(logged)}"
    return flaw, ""


def _only_second_copies_missing(delivered: Sequence[str], logged: Sequence[str]) -> bool:
    """Return whether only second copies of lines in the server's log were not delivered."""
    rest = iter(logged)
    in_order = all(line in rest for line in delivered)
    return in_order and list(dict.fromkeys(delivered)) == list(dict.fromkeys(logged))


def logged_lines(server: RealServer, run: Mapping[str, Any]) -> list[str]:
    """Return the lines of a run's only job from the server, without the library that is under test."""
    text = b""
    for submission in run["jobs"][0]["job_submissions"]:
        body = {"run_name": run["run_spec"]["run_name"], "job_submission_id": submission["id"]}
        page: dict[str, Any] = {"next_token": None}
        while "next_token" in page:
            # Servers before 0.19.16 have no tokens and return everything at once.
            token = {"next_token": page["next_token"]} if page["next_token"] else {}
            page = _asked(server, body | token | {"limit": _PAGE_LINES})
            text += b"".join(base64.b64decode(one["message"]) for one in page["logs"])
            if not page.get("next_token"):
                break
    return text.decode(errors="replace").split()


def _asked(server: RealServer, body: dict[str, Any]) -> dict[str, Any]:
    reply = httpx.post(
        f"{server.url}/api/project/{server.project}/logs/poll",
        json=body,
        headers={"Authorization": f"Bearer {server.token}"},
        timeout=_REQUEST_SECONDS,
    ).raise_for_status()
    page: dict[str, Any] = reply.json()
    return page


def _reason(run: Mapping[str, Any]) -> str:
    return str(run["jobs"][0]["job_submissions"][-1]["termination_reason"] or run["termination_reason"])


def _reported_failure(ended: Ended) -> str | None:
    """Return the reason of the failure that an error or an event reported."""
    if ended.error is None:
        return ended.other_lines[-1] if ended.status == "failed" and ended.other_lines else None
    outcome = getattr(ended.error, "outcome", None)
    reason = outcome.get("reason") if isinstance(outcome, dict) else getattr(outcome, "reason", None)
    return str(reason) if reason is not None else None


def _in_words(lines: Sequence[str]) -> str:
    if not lines:
        return "no lines"
    if list(lines) == LINES:
        return f"all {len(LINES)} lines"
    if list(lines) == LINES[: len(lines)]:
        return f"the first {len(lines)} lines"
    return f"{len(lines)} lines, {len(set(lines))} different"
