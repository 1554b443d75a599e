"""The ways to end a task that waits for a run in a real Prefect, each tried with every latency."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from uuid import UUID

from tests.faults import prefect_latency_workers as workers
from tests.faults.latency import LatencyCase, NotReached, Way
from tests.faults.latency_judge import LatencyResult, Seen
from tests.faults.prefect_latency_host import (
    OVER_SECONDS,
    RUNNER_FLOWS,
    START_SECONDS,
    LatencyHost,
    host,
    try_all,
    watch,
)
from tests.provider_prefect.latency_flows import MAPPED, TIMEOUT_SECONDS
from tests.provider_prefect.support import until

# Prefect kills the process of a cancelled flow run 30 s after SIGTERM; 10 s more for noticing the cancellation.
_CANCEL_LIMIT = 40.0
# No host ends a timed-out task, a script after Ctrl-C or a hook, so this is our own limit (seconds).
_NO_LIMIT = 90.0


def cancelled(host: LatencyHost, flow: str, count: int = 1, *, in_turn: bool = False) -> Way:
    """Return the way that cancels a flow run as the UI does.

    ``in_turn``: the flow runs start one after the other, and have a hook, which no process kills.
    """
    turn = threading.Lock() if in_turn else contextlib.nullcontext()

    def way(case: LatencyCase) -> Seen:
        with turn:
            flow_run_id = host.start(flow, case)
            runs = host.wait_for_runs(case, flow_run_id, count)
        case.begin()
        case.caused()
        host.api.set_state(flow_run_id, "CANCELLING")
        watch(case, runs, _NO_LIMIT if in_turn else _CANCEL_LIMIT)
        if in_turn:
            host.wait_for_hook(flow_run_id)
        return host.over(case, flow_run_id, runs, ["CANCELLED"], host.process_of(flow_run_id))

    return way


def timed_out(host: LatencyHost, flow: str, *, of_task: bool) -> Way:
    """Return the way that waits for the time limit of the flow or of its task."""

    def way(case: LatencyCase) -> Seen:
        flow_run_id = host.start(flow, case)
        runs = host.wait_for_runs(case, flow_run_id)
        case.begin()
        left = host.api.started(flow_run_id, of_task=of_task) + TIMEOUT_SECONDS - time.time()
        if left < 0:
            raise NotReached(f"expected a running run before the time limit, got one {-left:.1f} s after it")
        time.sleep(left)
        case.caused()
        watch(case, runs, _NO_LIMIT)
        return host.over(case, flow_run_id, runs, ["FAILED"], host.process_of(flow_run_id))

    return way


def interrupted(host: LatencyHost, flow: str) -> Way:
    """Return the way that presses Ctrl-C in a plain script."""

    def way(case: LatencyCase) -> Seen:
        with host.script(flow, case) as process:

            def started() -> UUID | None:
                if process.poll() is not None:
                    output = (host.folder / f"{case.name}.script").read_text()
                    raise NotReached(f"expected a running script, got {output[-300:]}")
                return host.flow_run_of(process.pid)

            flow_run_id = until(started, seconds=START_SECONDS, pause=0.5, what=f"the flow run of {flow}")
            assert flow_run_id is not None
            runs = host.wait_for_runs(case, flow_run_id)
            case.begin()
            case.caused()
            process.send_signal(signal.SIGINT)
            watch(case, runs, _NO_LIMIT)
            process.wait(OVER_SECONDS)
            return host.over(case, flow_run_id, runs, ["CRASHED"])

    return way


def killed(host: LatencyHost, flow: str) -> Way:
    """Return the way that kills a flow run's process, so that only its hook is left."""

    def way(case: LatencyCase) -> Seen:
        flow_run_id = host.start(flow, case)
        runs = host.wait_for_runs(case, flow_run_id)
        case.begin()
        case.caused()
        os.kill(host.process_of(flow_run_id), signal.SIGKILL)
        watch(case, runs, _NO_LIMIT)
        host.wait_for_hook(flow_run_id)
        return host.over(case, flow_run_id, runs, ["CRASHED"])

    return way


def ways(host: LatencyHost) -> dict[str, Way]:
    """Return all ways by their names in the table."""
    found = {
        "cancel, main thread": cancelled(host, "direct"),
        "cancel, submitted": cancelled(host, "submitted"),
        "cancel, mapped": cancelled(host, "mapped", MAPPED),
        "cancel, async": cancelled(host, "awaited"),
        "timeout of a task": timed_out(host, "task_timeout", of_task=True),
        "timeout of a submitted task": timed_out(host, "submitted_task_timeout", of_task=True),
        "timeout of an async task": timed_out(host, "awaited_task_timeout", of_task=True),
        "timeout of a flow": timed_out(host, "flow_timeout", of_task=False),
        "timeout of an async flow": timed_out(host, "awaited_flow_timeout", of_task=False),
        "Ctrl-C": interrupted(host, "direct"),
        "Ctrl-C, submitted": interrupted(host, "submitted"),
        "Ctrl-C, async": interrupted(host, "awaited"),
        "crash hook": killed(host, "hooked"),
    }
    for flow in RUNNER_FLOWS:
        # A Ray cluster fails if it does not start within 30 s, so these start one after the other.
        found[f"cancel, {flow.removesuffix('_sweep').title()}"] = cancelled(host, flow, in_turn=True)
    return found


def try_ways(only: str = "") -> list[LatencyResult]:
    """Return the results of all ways with every latency; ``only`` as in `try_latencies`."""
    with host(workers.SERVER_SETTINGS) as serving:
        return try_all(serving, ways(serving) | workers.ways(serving), only=only)
