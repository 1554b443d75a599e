"""Make a run part of the trace of what follows it, with OpenTelemetry's API where that is configured.

The problem: a trace should show where the time of a task went: waiting for a machine, pulling an image,
running. The code in the run may trace, too, and should appear in the same trace. Most users have no tracing,
and must not pay for it.

The idea: a process that configures OpenTelemetry has imported it, so it is looked up among the loaded modules
and never imported from here. The run gets the W3C trace context of the current span in its environment. When
the run has ended, its spans are made at once, from the times at which each status was seen first
(``Progress.since``), which ride with the position from process to process.

Source: W3C Trace Context, "traceparent"; OpenTelemetry specification, "Environment Variables as Context
Propagation Carriers" (``TRACEPARENT``, ``TRACESTATE``), and its semantic conventions (``error.type``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dstack_core.models.statuses import RunStatus, span_of

if TYPE_CHECKING:
    from dstack_core.models.outcome import Outcome

_NANOSECONDS = 1_000_000_000


def trace_env() -> dict[str, str]:
    """Return ``TRACEPARENT`` and ``TRACESTATE`` of the current span; nothing where nothing is traced.

    A context whose sampler decided against recording is passed on, so that the run is not recorded either. A
    context that no sampler decided about is not: Airflow gives its tasks one while its tracing is off, and it
    would silence the tracing of the code in the run.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return {}
    context: Any = trace.get_current_span().get_span_context()
    # The lowest bit of the flags is "sampled" (W3C Trace Context).
    if not context.is_valid or not (context.trace_flags & 1 or _has_provider(trace)):
        return {}
    env = {"TRACEPARENT": f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"}
    if context.trace_state:
        env["TRACESTATE"] = context.trace_state.to_header()
    return env


def _has_provider(trace: Any) -> bool:
    """Return whether the process has configured a tracer provider, so that something samples."""
    return type(trace.get_tracer_provider()).__name__ not in ("ProxyTracerProvider", "NoOpTracerProvider")


def phases(since: Mapping[str, float], ended_at: float) -> Iterator[tuple[str, float, float]]:
    """Yield the phases of a run with their begin and end, in seconds since the epoch.

    Args:
        since: When each status was seen first, as ``Progress.since``.
        ended_at: When the run ended, in seconds since the epoch.

    Returns:
        ``queued``, ``provisioning``, ``pulling`` and ``running``, those that were seen, oldest first.
    """
    begins: dict[str, float] = {}
    for status, begin in sorted(since.items(), key=lambda item: item[1]):
        if phase := span_of(RunStatus(status)):
            begins.setdefault(phase, begin)
    ordered = list(begins.items())
    ends = [*(begin for _, begin in ordered), ended_at][1:]
    for (phase, begin), end in zip(ordered, ends, strict=True):
        yield phase, begin, max(begin, end)


def wait_seconds(since: Mapping[str, float]) -> float | None:
    """Return how long a run waited until its commands started; None if that was not seen.

    The wait of a run that was already running when this task first saw it is unknown.
    """
    running, first = since.get(str(RunStatus.RUNNING)), min(since.values(), default=0.0)
    return None if running is None or first == running else max(0.0, running - first)


def trace_run(outcome: Outcome, since: Mapping[str, float]) -> None:
    """Add a run that has ended to the current trace: ``dstack.run`` with a span for each phase.

    Does nothing where nothing is traced.

    Args:
        outcome: How the run ended.
        since: When each status was seen first, as ``Progress.since``.
    """
    trace: Any = sys.modules.get("opentelemetry.trace")
    if trace is None or not since or not trace.get_current_span().get_span_context().is_valid:
        return
    tracer, begin = trace.get_tracer("dstack"), min(since.values())
    # A process that did not see the end itself, or not the begin, has the server's duration.
    last = begin + outcome.duration if outcome.duration else max(since.values())
    ended_at = max(begin, since.get(str(outcome.status), last))
    if outcome.duration and begin > ended_at - outcome.duration:
        begin = ended_at - outcome.duration
        if (first := min(since, key=lambda status: since[status])) == RunStatus.SUBMITTED:
            since = {**since, first: begin}
    known = {
        "dstack.run.name": outcome.run_name,
        "dstack.run.id": outcome.run_id,
        "dstack.run.url": outcome.url,
        "dstack.run.status": str(outcome.status),
        "dstack.run.category": outcome.category or None,
        "error.type": outcome.category or None,
        "dstack.run.cost_usd": outcome.cost,
        "dstack.instance": outcome.instance,
        "dstack.backend": outcome.backend,
        "dstack.region": outcome.region,
    }
    attributes = {name: value for name, value in known.items() if value is not None}
    span = tracer.start_span("dstack.run", start_time=_nanoseconds(begin), attributes=attributes)
    if not outcome.succeeded:
        span.set_status(trace.StatusCode.ERROR, outcome.message)
    inside = trace.set_span_in_context(span)
    for phase, start, end in phases(since, ended_at):
        part = tracer.start_span(f"dstack.{phase}", context=inside, start_time=_nanoseconds(start))
        part.end(end_time=_nanoseconds(end))
    span.end(end_time=_nanoseconds(ended_at))


def _nanoseconds(seconds: float) -> int:
    return int(seconds * _NANOSECONDS)
