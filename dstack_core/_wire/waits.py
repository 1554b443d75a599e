"""Describe what a run that has not started waits for, from the server's run object (PROTOCOL 1.5, 1.6).

The problem: a run may wait for an hour for a machine, or half an hour for its image, and its status is one
word all the time. What a person wants to know is spread over the run: the requirements of its job, why the
last attempt got no machine, the machine that it has, the image, and how much of it was downloaded.

The idea: one sentence fragment for the job that is furthest behind, from what the object has. Every field is
optional: servers before 0.22 send no progress of a pull, older ones no region or price.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from dstack_core._wire.http_messages import text, time_of
from dstack_core.models.money import format_price
from dstack_core.models.records import EventRecord
from dstack_core.models.statuses import RunStatus, job_status

_NO_CAPACITY = "failed_to_start_due_to_no_capacity"
# What a server reports about an attempt may quote an error of a cloud.
_MOST_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class WaitsFor:
    """What a run waits for: a ``text``, ``since`` when if the run has it, and the job's raw ``status``.

    ``job_id`` is that of the job's submission.
    """

    text: str
    since: datetime | None
    status: str
    job_id: str


def waits_for(data: Mapping[str, Any]) -> WaitsFor | None:
    """Return what a run waits for that has not started, None if that cannot be known."""
    try:
        return _waits_for(data)
    except (AttributeError, KeyError, TypeError, ValueError):
        # This is for display: what cannot be read here does not make a run unreadable.
        return None


def _waits_for(data: Mapping[str, Any]) -> WaitsFor | None:
    if start := text(data.get("next_triggered_at")):
        return WaitsFor(f"its schedule; next start at {time_of(start):%Y-%m-%d %H:%M:%S} UTC", None, "", "")
    latest = [
        (job, job["job_submissions"][-1]) for job in data.get("jobs") or [] if job.get("job_submissions")
    ]
    if not latest:
        return None
    steps = [job_status(str(last["status"])) for _, last in latest]
    waiting = [number for number, step in enumerate(steps) if step.is_before_start]
    job, last = latest[min(waiting, key=lambda number: steps[number].percent, default=0)]
    words = _words(data, job, last)
    if len(latest) > 1 and waiting:
        words += f" (job {latest.index((job, last)) + 1} of {len(latest)})"
    return WaitsFor(words, _since(job["job_submissions"]), str(last["status"]), str(last["id"]))


def with_events(waits: WaitsFor, events: Sequence[EventRecord]) -> WaitsFor:
    """Return ``waits`` with what the newest events add: since when, and what happened last."""
    since, words = waits.since, waits.text
    about = [one for one in events if any(target.get("id") == waits.job_id for target in one.targets)]
    newest = max(about, key=lambda one: one.recorded_at, default=None)
    began = [
        one.recorded_at
        for one in about
        if "status changed" in one.message and one.message.endswith(f"-> {waits.status.upper()}")
    ]
    if since is None and began:
        since = max(began)
    if newest is not None and not newest.message.startswith(("Job created", "Job status changed")):
        where = [
            str(one["name"]) for one in newest.targets if one.get("type") == "instance" and "name" in one
        ]
        place = f" ({where[0]})" if where else ""
        words += f". Last event at {_moment(newest.recorded_at)}: {_short(newest.message)}{place}"
    return WaitsFor(words, since, waits.status, waits.job_id)


def _words(run: Mapping[str, Any], job: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    spec = job.get("job_spec") or {}
    status = job_status(str(last["status"]))
    if status is RunStatus.DOWNLOADING:
        return f"image {spec.get('image_name') or '?'}{_pulled(last)}{_on(last)}"
    if status is RunStatus.PROVISIONING:
        return f"machine{_on(last, '')}" if last.get("job_provisioning_data") else "a machine"
    attempts = job["job_submissions"]
    ended = [one for one in attempts if one.get("finished_at") or one.get("termination_reason")]
    words = f"capacity: {_requirements(spec)}{_places(run)}"
    if ended and ended[-1] is last and last.get("termination_reason") != _NO_CAPACITY:
        words = "its next attempt"
    if ended:
        why = text(ended[-1].get("termination_reason_message")) or text(ended[-1].get("status_message"))
        count = f"{len(ended)} attempts" if len(ended) > 1 else "1 attempt"
        words += (
            f"; {count} so far, the last one: {_short(why or ended[-1].get('termination_reason') or '?')}"
        )
    elif (message := text(last.get("status_message"))) and message != last["status"]:
        words += f"; {_short(message)}"
    return words


def _requirements(spec: Mapping[str, Any]) -> str:
    needs = spec.get("requirements") or {}
    resources = needs.get("resources") or {}
    parts = []
    gpu = resources.get("gpu") or {}
    names = [str(name) for name in gpu.get("name") or []]
    # Newer servers add to a run without one: none, or any number of them.
    if gpu and (names or _least(gpu.get("count"))):
        memory = _range(gpu.get("memory"), "GB")
        shown = [",".join(names) or text(gpu.get("vendor")) or "", memory, _range(gpu.get("count"))]
        parts.append("gpu " + ":".join(part for part in shown if part))
    if cpu := resources.get("cpu"):
        parts.append(
            f"cpu {_range(cpu.get('count') if isinstance(cpu, Mapping) and 'count' in cpu else cpu)}"
        )
    if memory := _range(resources.get("memory"), "GB"):
        parts.append(f"memory {memory}")
    is_spot = needs.get("spot")
    parts.append("spot or on-demand" if is_spot is None else "spot" if is_spot else "on-demand")
    if (price := needs.get("max_price")) is not None:
        parts.append(f"at most {format_price(price)}")
    return ", ".join(parts)


def names_in(spec: Mapping[str, Any], key: str) -> list[str]:
    """Return the names in a list of a run's spec: the profile's, else the configuration's."""
    for source in ("profile", "configuration"):
        value = (spec.get(source) or {}).get(key)
        if isinstance(value, list) and value:
            return [str(one.get("name")) if isinstance(one, Mapping) else str(one) for one in value]
    return []


def _places(run: Mapping[str, Any]) -> str:
    """Return where a machine may be: backends, regions, fleets. The profile wins over the configuration."""
    spec = run.get("run_spec") or {}
    found = []
    for name in ("backends", "regions", "fleets"):
        if shown := names_in(spec, name):
            found.append(f"{name} {', '.join(shown[:5])}{', ...' if len(shown) > 5 else ''}")
    return f"; {'; '.join(found)}" if found else ""


def _on(last: Mapping[str, Any], before: str = ", on") -> str:
    data = last.get("job_provisioning_data") or {}
    kind = data.get("instance_type")
    name = text(kind.get("name")) if isinstance(kind, Mapping) else None
    # An SSH fleet has the same word for both.
    place = dict.fromkeys(filter(None, (text(data.get(key)) for key in ("backend", "region"))))
    price = data.get("price")
    words = [word for word in (name, *(("in", *place) if place else ())) if word]
    cost = f", {format_price(price)}" if isinstance(price, int | float) and price else ""
    return f"{before} {' '.join(words)}{cost}" if words else ""


def _pulled(last: Mapping[str, Any]) -> str:
    pull = last.get("image_pull_progress")
    if not isinstance(pull, Mapping):
        return ""
    done, extracted, total = (pull[f"{name}_bytes"] / 1e9 for name in ("downloaded", "extracted", "total"))
    least = "" if pull.get("is_total_bytes_final") else "at least "
    return f": {done:.1f} of {least}{total:.1f} GB downloaded, {extracted:.1f} GB extracted"


def _since(attempts: Sequence[Mapping[str, Any]]) -> datetime | None:
    """Return since when a job waits for capacity or its next attempt; None for a later step.

    The attempts in a row that got no machine are one wait, also between two of them.
    """
    last = attempts[-1]
    first = last.get("submitted_at")
    if last.get("termination_reason") != _NO_CAPACITY:
        status = job_status(str(last["status"]))
        if status.is_finished:
            # Between two attempts, of which the last had a machine.
            first = last.get("finished_at")
            return time_of(first) if first else None
        if status is not RunStatus.SUBMITTED:
            return None
    for one in reversed(attempts[:-1]):
        if one.get("termination_reason") != _NO_CAPACITY:
            break
        first = one.get("submitted_at") or first
    return time_of(first) if first else None


def _range(value: Any, unit: str = "") -> str:
    if not isinstance(value, Mapping):
        return "" if value is None else f"{value}{unit}"
    least, most = (value.get(end) for end in ("min", "max"))
    if least == most:
        return "" if least is None else f"{least:g}{unit}"
    return "..".join("" if end is None else f"{end:g}{unit}" for end in (least, most))


def _least(value: Any) -> Any:
    return value.get("min") if isinstance(value, Mapping) else value


def _moment(moment: datetime) -> str:
    return f"{moment:%H:%M:%S} UTC"


def _short(message: Any) -> str:
    words = " ".join(str(message).split()).rstrip(".")
    return words if len(words) <= _MOST_CHARACTERS else f"{words[:_MOST_CHARACTERS]} [...]"
