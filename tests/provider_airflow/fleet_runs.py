"""A DAG run of mapped tasks on a fleet: what the dstack server saw of it, and what Airflow shows."""

from __future__ import annotations

import fcntl
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dstack_core import Run
from tests.provider_airflow.fleet import Fleet
from tests.provider_airflow.support import runs_of, wait_for

FIRST = [f"before-{number}" for number in range(1, 6)]
LINES = [*FIRST, *(f"after-{number}" for number in range(1, 6))]
_STEP = re.compile(r"^(before|after|tick)-\d+$")
# A question for all tasks costs a busy Airflow a second.
_LOOK_SECONDS = 1.0


class Gate:
    """A gate for many runs that wait without using the CPU: each waits for the lock of a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")
        self.path = path
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def open(self) -> None:
        """Let all runs continue."""
        if not self._file.closed:
            self._file.close()

    @property
    def command(self) -> str:
        """Return a command that writes five lines, waits for the gate, and writes five more."""
        first, last = (f"for i in 1 2 3 4 5; do echo {part}-$i; done" for part in ("before", "after"))
        return f"{first}; flock -s {self.path} true; {last}"


class MappedRun:
    """A DAG run of the task ``train``, mapped ``number`` times; ``stops`` and ``applies`` are its requests since its start."""

    def __init__(self, fleet: Fleet, dag_id: str, command: str) -> None:
        self.fleet = fleet
        self.dag_id = dag_id
        self.number = int(dag_id.rpartition("_")[2])
        self._requests_before = len(fleet.dstack.requests)
        self.started = time.monotonic()
        self.run_id = fleet.trigger(dag_id, command=command)
        self._path = f"/api/v2/dags/{dag_id}/dagRuns/{self.run_id}/taskInstances"

    # What Airflow shows.

    def tasks(self) -> list[dict[str, Any]]:
        """Return all task instances, in the order of their numbers."""
        found = self.fleet.call("GET", f"{self._path}?limit=200")["task_instances"]
        return sorted(found, key=lambda task: int(task["map_index"]))

    def states(self) -> Counter[str]:
        """Return how many tasks are in each state."""
        return Counter(str(task["state"]) for task in self.tasks())

    def wait_for_states(self, *states: str, seconds: float = 300.0) -> None:
        """Return once each task is in one of the states."""

        def all_are() -> bool:
            found = self.states()
            return sum(found[state] for state in states) == self.number

        wait_for(f"{self.number} tasks of {self.dag_id} in {states}", all_are, seconds, _LOOK_SECONDS)

    def wait_for_triggerers(self, seconds: float = 120.0) -> list[str | None]:
        """Return the triggerer of each task, once each has one: a task is deferred before one takes its trigger."""

        def jobs() -> list[int] | None:
            found = [task["triggerer_job"] for task in self.tasks()]
            return [job["id"] for job in found] if all(found) else None

        ids = wait_for(
            f"{self.number} triggers of {self.dag_id} that are taken", jobs, seconds, _LOOK_SECONDS
        )
        names = self.fleet.triggerers()
        return [names.get(number) for number in ids]

    def lines(self, number: int, attempt: int = 1) -> list[str]:
        """Return what a task's log has of the output of its run."""
        path = f"{self._path}/train/logs/{attempt}?full_content=true&map_index={number}"
        records = self.fleet.call("GET", path)["content"]
        texts = [record if isinstance(record, str) else str(record.get("event", "")) for record in records]
        return [line for text in texts for line in text.split("\n") if _STEP.match(line)]

    def mark(self, number: int, state: str) -> None:
        """Mark one of the tasks, as a user does."""
        self.fleet.call("PATCH", f"{self._path}/train/{number}", {"new_state": state})

    def clear(self, numbers: list[int]) -> None:
        """Clear some of the tasks, as a user does."""
        body = {
            "dry_run": False,
            "dag_run_id": self.run_id,
            "task_ids": [["train", number] for number in numbers],
            "only_failed": False,
            "reset_dag_runs": True,
        }
        self.fleet.call("POST", f"/api/v2/dags/{self.dag_id}/clearTaskInstances", body)

    # What the dstack server saw.

    def requests(self, ending: str) -> int:
        """Return how many requests the server got since this was started."""
        requests = self.fleet.dstack.requests[self._requests_before :]
        return sum(request.path.endswith(ending) for request in requests)

    def runs(self) -> dict[int, list[Run]]:
        """Return the runs of each task by its number, newest first."""
        found: dict[int, list[Run]] = {number: [] for number in range(self.number)}
        for run in runs_of(self.fleet.dstack, f"airflow:{self.dag_id}/{self.run_id}/"):
            found[int((run.env or {})["NUMBER"])].append(run)
        return found

    def wait_for_runs(self, status: str, number: int | None = None, seconds: float = 300.0) -> None:
        """Return once so many tasks, by default all of them, have a run in this status."""
        expected = self.number if number is None else number

        def have() -> bool:
            return (
                sum(any(run.raw_status == status for run in runs) for runs in self.runs().values())
                >= expected
            )

        wait_for(f"{expected} {status} runs of {self.dag_id}", have, seconds, _LOOK_SECONDS)

    def wait_until_shown(self, last: str = FIRST[-1], seconds: float = 300.0) -> None:
        """Return once each task's log has this line."""
        missing = set(range(self.number))

        def shown() -> bool:
            for number in sorted(missing):
                if last not in self.lines(number):
                    return False
                missing.remove(number)
            return True

        wait_for(f"{last} in all logs of {self.dag_id}", shown, seconds, _LOOK_SECONDS)

    # What is promised.

    def assert_one_run_each(self, status: str = "done") -> None:
        """Assert that each task has one run, with this status, and that none was submitted twice."""
        found = {number: [run.raw_status for run in runs] for number, runs in self.runs().items()}
        assert found == {number: [status] for number in range(self.number)}

    def assert_logs(
        self, lines: list[str] = LINES, attempts: Callable[[int], int] = lambda number: 1
    ) -> None:
        """Assert that each log has these lines, each once and in order."""
        found = {number: self.lines(number, attempts(number)) for number in range(self.number)}
        assert found == dict.fromkeys(range(self.number), lines), [
            each for each in found.values() if each != lines
        ]

    def repeated_lines(self, lines: list[str]) -> list[int]:
        """Return how many lines each log repeats; fail if a log lacks one of ``lines`` or has them in another order."""
        repeated = []
        for number in range(self.number):
            found = self.lines(number)
            assert list(dict.fromkeys(found)) == lines, (number, found)
            repeated.append(len(found) - len(lines))
        return repeated


@contextmanager
def gate(path: Path) -> Iterator[Gate]:
    """Yield a closed gate, which is open at the end."""
    made = Gate(path)
    try:
        yield made
    finally:
        made.open()
