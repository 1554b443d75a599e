"""The ways to run a task in a flow: called or submitted, sync or async."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from prefect import flow

from dstack_core import Task
from prefect_dstack import arun_task, run_task

FAST: dict[str, Any] = {"poll_interval": 0.1}
THREE_LINES = Task(commands=["for i in 1 2 3; do echo line $i; sleep 0.1; done"])

Runner = Callable[..., dict[str, Any]]


def sync_direct(*args: Any, **options: Any) -> dict[str, Any]:
    @flow
    def direct() -> dict[str, Any]:
        return dict(run_task(*args, **options))

    return direct()


def sync_submitted(*args: Any, **options: Any) -> dict[str, Any]:
    @flow
    def submitted() -> dict[str, Any]:
        return dict(run_task.submit(*args, **options).result())

    return submitted()


def async_direct(*args: Any, **options: Any) -> dict[str, Any]:
    @flow
    async def adirect() -> dict[str, Any]:
        return dict(await arun_task(*args, **options))

    return asyncio.run(adirect())


def async_submitted(*args: Any, **options: Any) -> dict[str, Any]:
    @flow
    async def asubmitted() -> dict[str, Any]:
        return dict(await asyncio.to_thread(arun_task.submit(*args, **options).result))

    return asyncio.run(asubmitted())


def async_task_in_sync_flow(*args: Any, **options: Any) -> dict[str, Any]:
    @flow
    def mixed() -> dict[str, Any]:
        return dict(arun_task.submit(*args, **options).result())

    return mixed()


WAYS: list[Runner] = [sync_direct, sync_submitted, async_direct, async_submitted, async_task_in_sync_flow]
