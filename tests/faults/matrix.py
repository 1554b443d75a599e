"""Every fault at every step, for one or more adapters; many cases at once, because they mostly wait."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from urllib3.util.retry import Retry

from dstack_core._flow import retry
from dstack_core.local import LocalServer
from tests.faults.case import Adapter
from tests.faults.faults import FAULTS, KILLS, Fault
from tests.faults.interference import INTERFERENCES, Interference
from tests.faults.life import (
    INTERFERENCE,
    KILLED,
    NEVER_ENDING,
    ONCE,
    STEPS,
    Result,
    Stage,
    try_fault,
    try_interference,
)
from tests.faults.loop import Loop

# On a busy machine the short budget may be spent before the fault comes; such a case is tried again.
_TRIES = 4
# Cases at once. They mostly wait, so six fit on two cores.
_WORKERS = 6

Plan = list[Callable[[Stage], Result]]


@contextmanager
def shorter_waits() -> Iterator[None]:
    """Divide the pauses between retries by 25, because every case of the matrix retries."""
    before, log = retry._BACKOFF, logging.getLogger("dstack_core")
    level = log.level
    retry._BACKOFF = Retry(total=None, backoff_factor=0.01, backoff_max=0.8, backoff_jitter=0.03)
    # This logger reports every fault that is retried.
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        retry._BACKOFF = before
        log.setLevel(level)


@contextmanager
def stage() -> Iterator[Stage]:
    """Start the embedded server, and the event loop of the proxies."""
    with (
        shorter_waits(),
        tempfile.TemporaryDirectory(prefix="faults-") as folder,
        Loop() as loop,
        LocalServer(step_seconds=0.0, stop_grace_seconds=0.2) as server,
    ):
        with server.client() as client:
            # The server generates its user's key with the first request, which takes long.
            client.user()
        yield Stage(loop, server, Path(folder))


def plan(adapters: Mapping[str, Adapter], parts: Collection[str], steps: Collection[int]) -> Plan:
    """Return the cases of the chosen parts that begin at one of ``steps``."""
    cases: Plan = []
    for step in steps:
        for name, adapter in adapters.items():
            for fault in FAULTS:
                if ONCE in parts:
                    cases.append(_fault(name, adapter, fault, step, forever=False))
                if NEVER_ENDING in parts:
                    cases.append(_fault(name, adapter, fault, step, forever=True))
            if KILLED in parts:
                cases += [_fault(name, adapter, kill, step, forever=False) for kill in KILLS]
            for interference in INTERFERENCES:
                if INTERFERENCE in parts and step in interference.steps:
                    cases.append(_interference(name, adapter, interference, step))
    return cases


def sample(adapters: Mapping[str, Adapter]) -> Plan:
    """Return every fault once, each at another step."""
    return [
        _fault(name, adapter, fault, STEPS[(3 * number + 7 * other) % len(STEPS)], forever=False)
        for number, fault in enumerate(FAULTS)
        for other, (name, adapter) in enumerate(adapters.items())
    ]


def try_all(cases: Plan) -> list[Result]:
    """Return the results of all cases; a case whose fault did not come is tried again."""
    with stage() as where, ThreadPoolExecutor(_WORKERS) as pool:

        def one(case: Callable[[Stage], Result]) -> Result:
            for _ in range(_TRIES):
                result = case(where)
                if result.reached:
                    break
            return result

        return list(pool.map(one, cases))


def _fault(
    name: str, adapter: Adapter, fault: Fault, step: int, *, forever: bool
) -> Callable[[Stage], Result]:
    return lambda where: try_fault(where, name, adapter, fault, step, forever=forever)


def _interference(
    name: str, adapter: Adapter, interference: Interference, step: int
) -> Callable[[Stage], Result]:
    return lambda where: try_interference(where, name, adapter, interference, step)
