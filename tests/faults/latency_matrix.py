"""All ways to end a task with all `LATENCIES`, several cases at once; their results, saved and as a table."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import dstack_core as dstack
from dstack_core.local import LocalServer
from tests.faults.latency import LATENCIES, Latency, LatencyCase, LatencyProxy, NotReached, Way
from tests.faults.latency_judge import LatencyResult, Seen
from tests.faults.loop import Loop
from tests.rig.server import RealServer

# A case that did not reach its cause, because the machine was busy, is tried again.
_TRIES = 3
_NUMBERS = itertools.count(1)
_LOG = logging.getLogger(__name__)


def try_latencies(
    server: LocalServer | RealServer,
    ways: Mapping[str, Way],
    reap: Callable[[], object],
    *,
    only: str = "",
    faults: Sequence[Latency] = LATENCIES,
    workers: int = 6,
) -> list[LatencyResult]:
    """Return the results of all ways with all faults, ``workers`` at once.

    ``only`` is a regular expression that must be found in ``"way, fault"``. ``reap`` does one pass of the
    environment's reaper against the server itself. It is called once, after all cases, if one of them left its run.
    """
    with (
        Loop() as loop,
        dstack.Client(server_url=server.url, project_name=server.project, user_token=server.token) as client,
        ThreadPoolExecutor(workers) as pool,
    ):

        def one(pair: tuple[str, Latency]) -> tuple[LatencyCase, Seen] | LatencyResult:
            way, fault = pair
            for _ in range(_TRIES):
                with LatencyProxy(loop, server.url, fault) as proxy:
                    case = LatencyCase(way, fault, f"latency-{next(_NUMBERS)}", proxy, server, client)
                    try:
                        seen = ways[way](case)
                        case.drain()
                        return case, seen
                    except NotReached as error:
                        flaw = str(error)
                    except Exception as error:
                        _LOG.exception("%s, %s", way, fault.name)
                        flaw = _in_one_line(error)
                        break
            return LatencyResult(way, fault.name, flaw=flaw)

        tried = list(pool.map(one, _chosen(ways, faults, only)))
        left = [one[0] for one in tried if isinstance(one, tuple) and not one[0].is_stopped()]
        why_not = _failure_of(reap) if left else ""
        reaped = {id(case): case.is_stopped() for case in left}
        for case in left:
            assert case.run is not None
            with suppress(dstack.DstackError):
                case.run.stop(abort=True)
    return [
        one
        if isinstance(one, LatencyResult)
        else _judged(*one, reaped.get(id(one[0])), why_not if one[0] in left else "")
        for one in tried
    ]


def are_chosen(ways: Mapping[str, Way], faults: Sequence[Latency], only: str) -> bool:
    """Return whether ``only`` matches some of these cases."""
    return bool(_chosen(ways, faults, only))


def _chosen(ways: Mapping[str, Way], faults: Sequence[Latency], only: str) -> list[tuple[str, Latency]]:
    # Fault by fault, so that a way that loads the host is not tried many times at once.
    pairs = [(way, fault) for fault in faults for way in ways]
    return [(way, fault) for way, fault in pairs if re.search(only, f"{way}, {fault.name}")]


def _judged(case: LatencyCase, seen: Seen, reaped: bool | None, why_not: str) -> LatencyResult:
    result = case.judged(seen, reaped=reaped, why_not=why_not)
    level = logging.WARNING if result.flaw else logging.INFO
    if _LOG.isEnabledFor(level):
        log = "\n".join(f"  {logging.getLevelName(one.level)} {one.text}" for one in seen.log)
        stops = " ".join(f"{one:.1f}" for one in case.proxy.stops_since(case.caused_at))
        _LOG.log(level, "%s\n  stops after the cause: %s\n%s", result, stops, log)
    return result


def _failure_of(reap: Callable[[], object]) -> str:
    try:
        reap()
    except Exception as error:
        _LOG.exception("the reaper's pass")
        return f" ({_in_one_line(error)})"
    return ""


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def save(results: Sequence[LatencyResult], path: Path) -> None:
    """Save results for the report, in place of earlier results of the same cases."""
    tried = {(one.way, one.fault) for one in results}
    before = load([path]) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [one for one in before if (one.way, one.fault) not in tried]
    path.write_text(json.dumps([asdict(one) for one in [*kept, *results]], indent=1))


def load(paths: Iterable[Path]) -> list[LatencyResult]:
    """Return the saved results."""
    return [LatencyResult(**item) for path in paths for item in json.loads(path.read_text())]


def table(results: Sequence[LatencyResult]) -> str:
    """Return a table in Markdown: ways by faults, held/tried.

    ``+``: the run was stopped after the host's limit. ``*``: the reaper stopped it. Both: the log names the run's
    page.
    """
    faults = [one.name for one in LATENCIES if any(result.fault == one.name for result in results)]
    rows = [["way to end", *faults, "all"], ["---", *["---:"] * len(faults), "---:"]]
    for way in dict.fromkeys(one.way for one in results):
        of = [one for one in results if one.way == way]
        rows.append([way, *(_cell([one for one in of if one.fault == name]) for name in faults), _sum(of)])
    rows.append(
        ["**all**", *(_sum([r for r in results if r.fault == name]) for name in faults), _sum(results)]
    )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def flaws(results: Sequence[LatencyResult], *, why: bool = True) -> list[str]:
    """Return one line for each case that did not hold."""
    return [f"{one.way}, {one.fault}" + (f": {one.flaw}" if why else "") for one in results if one.flaw]


def _cell(results: Sequence[LatencyResult]) -> str:
    if not results:
        return "-"
    marks = {"late": " +", "reaper": r" \*"}
    return _sum(results) + "".join(sorted({marks.get(one.how, "") for one in results}))


def _sum(results: Sequence[LatencyResult]) -> str:
    return f"{sum(not one.flaw for one in results)}/{len(results)}"
