"""What a real server itself says of a run that it was restarted under, and what it lost of it on its own."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from tests.faults.case import Ended
from tests.faults.judges import LINES, Life, right_end
from tests.rig.server import RealServer

_PAGE_LINES = 1000
_REQUEST_SECONDS = 30.0


def judge(life: Life, logged: Sequence[str]) -> tuple[str, str]:
    """Return what is wrong, and what the server lost on its own; both are empty where nothing was lost.

    ``logged`` are the lines that the server's own log holds once the run is over. Of lines that the server
    has twice, the second copy may be told or not: it is older than what was read already, and whether the
    server shows it depends on the moment it was asked.
    """
    flaw = right_end(life)
    if not flaw or len(life.runs) != 1:
        return flaw, ""
    if list(life.ended.lines) != list(logged) and not _only_second_copies_missing(life.ended.lines, logged):
        return f"{flaw}; the server's log holds {_in_words(logged)}", ""
    run = life.runs[0]
    if run["status"] == "failed":
        reason = _reason(run)
        if _told_failure(life.ended) != reason:
            return f"{flaw}; the server says {reason}", ""
        return "", f"the server failed the run: {reason}; its log holds {_in_words(logged)}"
    if run["status"] == life.ended.status == "done":
        return "", f"the server's log holds {_in_words(logged)}"
    return flaw, ""


def _only_second_copies_missing(told: Sequence[str], logged: Sequence[str]) -> bool:
    """Tell whether what was told is the server's log without some lines that stand in it before."""
    rest = iter(logged)
    in_order = all(line in rest for line in told)
    return in_order and list(dict.fromkeys(told)) == list(dict.fromkeys(logged))


def logged_lines(server: RealServer, run: Mapping[str, Any]) -> list[str]:
    """Return the lines of a run's only job as the server has stored them, without the library that is judged."""
    text = b""
    for submission in run["jobs"][0]["job_submissions"]:
        body = {"run_name": run["run_spec"]["run_name"], "job_submission_id": submission["id"]}
        page: dict[str, Any] = {"next_token": None}
        while "next_token" in page:
            # Servers before 0.19.16 know no tokens, and give everything at once.
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


def _told_failure(ended: Ended) -> str | None:
    """Return the reason of the failure that was told, by an error or by an event."""
    if ended.error is None:
        return ended.told[-1] if ended.status == "failed" and ended.told else None
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
