"""Every fault at every step, for one adapter or more; many cases at once, for they mostly wait."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from urllib3.util.retry import Retry

from dstack_core._flow import retry
from dstack_core.local import LocalServer
from tests.faults.case import Adapter
from tests.faults.faults import FAULTS, Fault
from tests.faults.life import STEPS, Result, try_case
from tests.faults.loop import Loop

# Where a fault that never ends begins: before the run exists, when it is submitted, while it is followed.
BEGINNINGS = (1, 4, 8)
# On a machine without a moment to spare the short budget may be spent before the fault has come.
_TRIES = 4


@contextmanager
def shorter_waits() -> Iterator[None]:
    """Divide the pauses between two tries by 25: cases wait for faults, not for politeness."""
    before, log = retry._BACKOFF, logging.getLogger("dstack_core")
    level = log.level
    retry._BACKOFF = Retry(total=None, backoff_factor=0.01, backoff_max=0.8, backoff_jitter=0.03)
    # Every fault that is borne is told there.
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        retry._BACKOFF = before
        log.setLevel(level)


def try_all(
    adapters: Mapping[str, Adapter],
    *,
    faults: Sequence[Fault] = FAULTS,
    steps: Sequence[int] = tuple(STEPS),
    beginnings: Sequence[int] = BEGINNINGS,
    sample: bool = False,
    workers: int = 6,
) -> list[Result]:
    """Return the results of every fault once at every step, and for ever from each of ``beginnings`` on.

    A ``sample`` is every fault at one step, another for each.
    """
    plan = [(name, fault, step, False) for step in steps for fault in faults for name in adapters]
    plan += [(name, fault, step, True) for step in beginnings for fault in faults for name in adapters]
    if sample:
        plan = [
            (name, fault, steps[(3 * number + 7 * other) % len(steps)], False)
            for number, fault in enumerate(faults)
            for other, name in enumerate(adapters)
        ]
    with (
        shorter_waits(),
        tempfile.TemporaryDirectory(prefix="faults-") as folder,
        Loop() as loop,
        LocalServer(step_seconds=0.0, stop_grace_seconds=0.2) as server,
        ThreadPoolExecutor(workers) as pool,
    ):
        with server.client() as client:
            # The server makes its user's key at the first request, which takes long.
            client.user()

        def one(item: tuple[str, Fault, int, bool]) -> Result:
            name, fault, step, for_ever = item
            for _ in range(_TRIES):
                result = try_case(
                    name, adapters[name], loop, server, Path(folder), fault, step, for_ever=for_ever
                )
                if result.reached:
                    break
            return result

        return list(pool.map(one, plan))
