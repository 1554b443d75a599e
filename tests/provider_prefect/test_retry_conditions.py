"""A task is tried again by the failure category of its run."""

from __future__ import annotations

from typing import Any

import pytest
from prefect import Task, flow
from prefect.states import Failed

from dstack_core import ConfigurationError, NoCapacityError, RunUserError, ServerUnreachableError
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, arun_task, retry_on, run_task

from .support import all_runs

NO_MACHINE = {"resources": {"gpu": "B200:64"}}
FAST: dict[str, Any] = {"poll_interval": 0.1}


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("task", [run_task, arun_task])
@pytest.mark.parametrize("persist", [False, True])
def test_only_a_cause_that_may_pass_is_tried_again(
    task: Any, dstack: LocalServer, credentials: DstackCredentials, persist: bool
) -> None:
    options: dict[str, Any] = {"retries": 2, "retry_delay_seconds": 0, "persist_result": persist}
    retried = task.with_options(**options, retry_condition_fn=retry_on("capacity", "spot"))

    @flow
    def waiting() -> None:
        retried.submit({"type": "task", "commands": ["true"], **NO_MACHINE}, credentials, **FAST).result()

    @flow
    def wrong() -> None:
        retried.submit({"type": "task", "commands": ["exit 3"]}, credentials, **FAST).result()

    with pytest.raises(NoCapacityError):
        waiting()
    assert len(all_runs(dstack)) == 3
    with pytest.raises(RunUserError, match=r"user\.exit"):
        wrong()
    assert len(all_runs(dstack)) == 4, "a command that fails is not tried again"


def test_the_default_is_what_may_pass() -> None:
    condition: Any = retry_on()
    assert condition(Task(lambda: None), None, Failed(data=ServerUnreachableError("no answer")))
    assert not condition(Task(lambda: None), None, Failed(data=ValueError("my own")))
    assert not condition(Task(lambda: None), None, Failed(data=None))


def test_a_name_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"retry_on: expected failure categories .* got 'capcity'"):
        retry_on("capcity")


@pytest.mark.parametrize("names", [(["capacity", "spot"],), (("capacity",), "spot")])
def test_a_list_of_names_is_taken(names: Any) -> None:
    assert callable(retry_on(*names))
    with pytest.raises(ConfigurationError, match=r"retry_on: expected failure categories .* got 3"):
        retry_on([3])  # type: ignore[list-item]
