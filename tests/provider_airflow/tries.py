"""One task instance over its tries; the store is a dict that lives as long as Airflow's would."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

from airflow_provider_dstack._names import TaskNames
from airflow_provider_dstack._previous_try import RECORD_KEY, Record
from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core import Run, Task
from dstack_core.local import LocalServer

STARTED = datetime(2026, 11, 23, 12, tzinfo=UTC)


class Store:
    """A store of values like Airflow's task state store."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def set(self, key: str, value: Any) -> None:
        self.values[key] = value

    def delete(self, key: str) -> None:
        self.values.pop(key, None)


class BrokenStore(Store):
    """A store that fails as it does when its backend is away."""

    def get(self, key: str) -> Any:
        raise OSError("the store is away")

    def set(self, key: str, value: Any) -> None:
        raise OSError("the store is away")

    delete = get


class Tries:
    """One task instance over its tries; ``store`` None is Airflow before 3.3."""

    def __init__(self, server: LocalServer, store: Store | None, **arguments: Any) -> None:
        self.server = server
        self.store = store
        self.arguments = {"poll_interval": 0.1, "retries": 2, **arguments}
        self.ti = SimpleNamespace(
            dag_id="d", run_id="r", task_id="train", try_number=1, max_tries=2, map_index=-1, id="1"
        )

    def next_try(self, *, cleared: bool = False) -> None:
        if cleared:
            self.ti.max_tries = self.ti.try_number + 2
        self.ti.try_number += 1
        self.ti.id = f"{self.ti.id}'"

    def operator(self, *commands: str, **arguments: Any) -> DstackRunOperator:
        return DstackRunOperator(
            task_id="train",
            **{"configuration": Task(commands=list(commands or ("true",))), **self.arguments, **arguments},
        )

    @property
    def context(self) -> Any:
        context: dict[str, Any] = {"ti": self.ti, "dag_run": SimpleNamespace(start_date=STARTED)}
        return context if self.store is None else {**context, "task_state_store": self.store}

    @property
    def names(self) -> TaskNames:
        return TaskNames.of(self.context, retries=2)

    def lost(self, *commands: str, former: bool = False) -> Run:
        """Leave behind what a lost worker does: a run that keeps running, and its record.

        With ``former`` the worker had an earlier version of this package.
        """
        names = self.names
        ref = names.former_run if former else names.run
        run = self.server.client().runs.submit(
            Task(commands=list(commands)), run_name=ref.name, marker=ref.marker
        )
        if type(self.store) is Store:
            told = Record(ref.name, ref.marker, "main", self.ti.try_number, self.ti.max_tries)
            self.store.set(RECORD_KEY, {name: getattr(told, name) for name in told.__slots__})
        self.next_try()
        return run

    def execute(self, *commands: str, **arguments: Any) -> dict[str, Any]:
        result: dict[str, Any] = self.operator(*commands, **arguments).execute(self.context)
        return result

    def runs(self) -> list[Run]:
        return self.server.client().runs.list(all=True)


def record_of(tries: Tries) -> dict[str, Any]:
    return {
        "run_name": tries.names.run.name,
        "marker": tries.names.run.marker,
        "project": "main",
        "try_number": 1,
        "max_tries": 2,
        "run_id": None,
    }
