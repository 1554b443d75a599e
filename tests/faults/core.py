"""The two adapters of the core: ``run.follow()`` of the sync and the async client."""

from __future__ import annotations

import asyncio

import dstack_core as dstack
from tests.faults.case import Adapter, Case, Ended


def follow_sync(case: Case) -> Ended:
    """Submit and follow with ``Client``."""
    lines: list[str] = []
    try:
        with dstack.Client(**case.arguments()) as client:
            run = client.runs.submit(case.task, case.name)
            for event in run.follow(poll_interval=case.poll_interval, retry_budget=case.budget):
                if isinstance(event, dstack.LogLines):
                    lines += event.lines
                elif isinstance(event, dstack.RunFinished):
                    return Ended(lines, str(event.outcome.status), other_lines=[str(event.outcome.reason)])
    except Exception as error:
        return Ended(lines, None, error)
    return Ended(lines, None)


def follow_async(case: Case) -> Ended:
    """Submit and follow with ``AsyncClient``."""
    lines: list[str] = []

    async def body() -> Ended:
        async with dstack.AsyncClient(**case.arguments()) as client:
            run = await client.runs.submit(case.task, case.name)
            async for event in run.follow(poll_interval=case.poll_interval, retry_budget=case.budget):
                if isinstance(event, dstack.LogLines):
                    lines.extend(event.lines)
                elif isinstance(event, dstack.RunFinished):
                    return Ended(lines, str(event.outcome.status), other_lines=[str(event.outcome.reason)])
        return Ended(lines, None)

    try:
        return asyncio.run(body())
    except Exception as error:
        return Ended(lines, None, error)


ADAPTERS = {
    "run.follow(), sync": Adapter(follow_sync),
    "run.follow(), async": Adapter(follow_async),
}
