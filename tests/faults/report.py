"""Print the matrix of faults, steps and adapters, and write docs/reliability.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from tests.faults import junit, latency_matrix
from tests.faults.latency_judge import LatencyResult
from tests.faults.life import INTERFERENCE, KILLED, NEVER_ENDING, ONCE, PARTS, RESTARTS, Result

ROOT = Path(__file__).parent.parent.parent
TEMPLATE = Path(__file__).with_name("reliability.md.in")
PAGE = ROOT / "docs" / "reliability.md"


def save(results: Sequence[Result], path: Path) -> None:
    """Save the results of one environment for the report of all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(result) for result in results], indent=1))


def load(paths: Iterable[Path]) -> list[Result]:
    """Return the saved results."""
    return [Result(**item) for path in paths for item in json.loads(path.read_text())]


def matrix(results: Sequence[Result], what: str = "fault") -> str:
    """Return a table in Markdown: faults by adapters, held/tried."""
    adapters = list(dict.fromkeys(result.adapter for result in results))
    rows = [[what, *adapters], ["---", *["---:"] * len(adapters)]]
    for name in dict.fromkeys(result.fault for result in results):
        cells = [_cell([r for r in results if (r.fault, r.adapter) == (name, one)]) for one in adapters]
        rows.append([name, *cells])
    rows.append(["**all**", *(f"**{_cell([r for r in results if r.adapter == a])}**" for a in adapters)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def steps(results: Sequence[Result]) -> str:
    """Return a table in Markdown: steps by adapters, held/tried; a step is the request that the fault hit."""
    adapters = list(dict.fromkeys(result.adapter for result in results))
    rows = [["request no.", *adapters], ["---:", *["---:"] * len(adapters)]]
    for step in sorted({result.step for result in results}):
        cells = [_cell([r for r in results if (r.step, r.adapter) == (step, name)]) for name in adapters]
        rows.append([str(step), *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def steps_of_each(results: Sequence[Result]) -> str:
    """Return the table of steps of each fault, below a line that names it."""
    faults = dict.fromkeys(result.fault for result in results)
    return "\n\n".join(f"*{name}*:\n\n{steps([r for r in results if r.fault == name])}" for name in faults)


def losses(results: Sequence[Result]) -> str:
    """Return in Markdown how often the server lost something on its own, and where."""
    found = [result for result in results if result.loss]
    summary = f"The server itself lost data in {len(found)} of {len(results)} cases"
    cases = [f"* {one.adapter}, {one.fault}, {_when(one)}: {one.loss}" for one in found]
    return "\n".join([f"{summary}:\n", *cases]) if found else f"{summary}."


def _when(result: Result) -> str:
    return f"request {result.step} ({result.endpoint})" if result.step else f"the run was {result.endpoint}"


def flaws(results: Sequence[Result], *, why: bool = True) -> list[str]:
    """Return a line for each case that did not hold, or whose fault never came."""
    return [
        f"{result.adapter}, {result.fault}, request {result.step} ({result.endpoint}), {result.part}"
        f"{': ' + (result.flaw or 'the fault never came') if why else ''}"
        for result in results
        if result.flaw or not result.reached
    ]


def write_page(
    results: Sequence[Result], slow: Sequence[LatencyResult], beside: Sequence[junit.Case]
) -> None:
    """Fill in the template: the wording comes from the template, the numbers from the results."""
    of = {part: [one for one in results if one.part == part] for part in PARTS}
    tried = len(results) + len(slow)
    found = len(flaws(results)) + len(latency_matrix.flaws(slow))
    page = TEMPLATE.read_text().format(
        tried=tried,
        held=tried - found,
        beside_tried=len(beside),
        beside_held=sum(one.held for one in beside),
        once=matrix(of[ONCE]),
        steps=steps(of[ONCE]),
        ever=matrix(of[NEVER_ENDING]),
        slowest=max((one.seconds for one in of[NEVER_ENDING]), default=0.0),
        interference=matrix(of[INTERFERENCE], "interference"),
        restarts=matrix([one for one in of[RESTARTS] if not one.step], "restarted"),
        restarts_at_requests=steps_of_each([one for one in of[RESTARTS] if one.step]),
        losses=losses(of[RESTARTS]),
        killed=matrix(of[KILLED], "killed"),
        killed_steps=steps(of[KILLED]),
        killed_again=sum(bool(one.repeated) for one in of[KILLED]),
        latency=latency_matrix.table(slow),
        latency_by_page=sum(one.how in ("late", "reaper") for one in slow),
        latency_tried=len(slow),
        suites=junit.sections(beside),
        flaws="\n".join(
            f"* {line}"
            for line in [
                *flaws(results, why=False),
                *latency_matrix.flaws(slow, why=False),
                *junit.flaws(beside),
            ]
        )
        or "None.",
    )
    PAGE.write_text(page)


def _cell(results: Sequence[Result]) -> str:
    if not results:
        return "-"
    held = sum(result.reached and not result.flaw for result in results)
    return f"{held}/{len(results)}"
