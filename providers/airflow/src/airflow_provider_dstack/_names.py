"""The names and markers of runs, by which every try recognizes the runs of earlier tries (PROTOCOL 1.4).

A name reads ``dag-task-index-hash``, such as ``etl-train-3-9k2f01xq``. In earlier versions it was ``af-`` and
12 hex digits. A task that is upgraded in the middle knows its run by that name: a trigger and a record hold
the name itself, and where neither is at hand, ``former_name_in`` returns it. Markers never changed. A run of
a later step (``fallbacks``) has ``-s2`` behind the name, and ``/step2`` behind the marker, of step 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import Context
    from dstack_core.integration import RunRef


# At the end of a marker, so that markers of versions that did not have it are read as before.
_KEEP = "/keep"
# A DAG run's id may hold slashes where the Airflow allows it; the ids of DAGs and tasks hold none.
_MARKER = re.compile(
    r"airflow:(?P<dag>[^/]+)/(?P<run>.+)/(?P<task>[^/\[]+)(?:\[(?P<index>\d+)\])?"
    r"/(?P<try>\d+)of\d+#(?P<born>[0-9a-f]{6})(?P<keep>/keep)?(?:/step\d+)?"
)


@dataclass(frozen=True, slots=True)
class TaskNames:
    """The names and markers of one task instance's runs.

    ``task`` is ``airflow:dag/run/task[map_index]``. ``born`` distinguishes a DAG run from one that was
    deleted and made again, and two Airflows that share a project: it is derived from the time at which the
    DAG run started, not from the id of the task instance, because Airflow changes that id with every try.
    ``max_tries`` distinguishes a cleared task from a retried one, because clearing raises it. ``chosen`` is
    the run name that the user wants, or None. ``keep`` marks a run that only its owner stops.
    """

    task: str
    born: str
    try_number: int
    max_tries: int
    retries: int
    chosen: str | None = None
    keep: bool = False

    @classmethod
    def of(
        cls, context: Context, chosen: str | None = None, retries: int = 0, *, keep: bool = False
    ) -> TaskNames:
        """Return the names for the task instance of a context; ``retries`` is the operator's."""
        from dstack_core.integration import make_marker

        ti = context["ti"]
        index = ti.map_index if ti.map_index is not None and ti.map_index >= 0 else None
        started = getattr(context.get("dag_run"), "start_date", None)
        return cls(
            task=make_marker("airflow", ti.dag_id, ti.run_id, f"{ti.task_id}{_shown(index)}"),
            born=birth_of(started),
            try_number=ti.try_number,
            max_tries=ti.max_tries,
            retries=retries,
            chosen=chosen if chosen is None or index is None else _with_index(chosen, index),
            keep=keep,
        )

    @property
    def run(self) -> RunRef:
        """The run of this try; its marker reads ``airflow:dag/run/task[3]/2of4#5f1c9a``.

        ``/keep`` follows for a run that is kept whatever happens to its task.
        """
        return run_ref(self.name_in(self.try_number), self.marker_in(self.try_number, self.max_tries))

    @property
    def is_retry(self) -> bool:
        """Whether there was an earlier try, and the task was not cleared since."""
        return self.try_number > max(1, self.max_tries - self.retries + 1)

    @property
    def earlier_tries(self) -> range:
        """The numbers of the tries whose run may still matter, the latest first.

        Those are the tries since the task was last cleared, and at least the one before this.
        """
        first = min(self.max_tries - self.retries + 1, self.try_number - 1)
        return range(self.try_number - 1, max(first, 1) - 1, -1)

    def name_in(self, try_number: int) -> str:
        """Return the run name of a try: the chosen one, or one made of the DAG, the task and a hash."""
        return self.chosen or _generated_name(self.task, try_number, self.born)

    def former_name_in(self, try_number: int) -> str:
        """Return the run name of a try in an earlier version: the chosen one, else ``af-`` and a hash."""
        return self.chosen or _former_name(self.task, try_number, self.born)

    @property
    def former_run(self) -> RunRef:
        """The run of this try if an earlier version submitted it."""
        return run_ref(self.former_name_in(self.try_number), self.marker_in(self.try_number, self.max_tries))

    def marker_in(self, try_number: int, max_tries: int) -> str:
        """Return the marker of a try, by which its run is recognized later."""
        keep = _KEEP if self.keep else ""
        return f"{self.task}/{try_number}of{max_tries + 1}#{self.born}{keep}"

    def read_marker(self, marker: str) -> tuple[int, int] | None:
        """Return ``(try_number, max_tries)`` of a marker of this task instance, None for any other."""
        from dstack_core.integration import split_step

        plain = split_step(marker)[0].removesuffix(_KEEP)
        numbers = plain.removeprefix(f"{self.task}/").removesuffix(f"#{self.born}").split("of")
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            return None
        try_number, max_tries = int(numbers[0]), int(numbers[1]) - 1
        expected = replace(self, keep=False).marker_in(try_number, max_tries)
        return (try_number, max_tries) if plain == expected else None

    def first_of(self, run: RunRef) -> RunRef:
        """Return the identity of step 1 of the job of which ``run`` is a step."""
        from dstack_core.integration import split_step, step_ref

        marker, number = split_step(run.marker)
        if number == 1:
            return run
        for name in (self.chosen,) if self.chosen else _generated_names(marker):
            first = run_ref(name, marker)
            if step_ref(first, number).name == run.name:
                return first
        # The user has chosen another name since.
        return run_ref(run.name.removesuffix(f"-s{number}"), marker)


@dataclass(frozen=True, slots=True)
class MarkedTask:
    """The task instance that a run's marker names; ``born`` and ``keep`` are as for ``TaskNames``."""

    dag_id: str
    run_id: str
    task_id: str
    map_index: int | None
    try_number: int
    born: str
    keep: bool

    @classmethod
    def read(cls, marker: str | None) -> MarkedTask | None:
        """Return the task instance of a marker, None for a marker that no Airflow task wrote."""
        found = _MARKER.fullmatch(marker or "")
        if found is None:
            return None
        return cls(
            dag_id=found["dag"],
            run_id=found["run"],
            task_id=found["task"],
            map_index=None if found["index"] is None else int(found["index"]),
            try_number=int(found["try"]),
            born=found["born"],
            keep=found["keep"] is not None,
        )

    def __str__(self) -> str:
        return f"{self.dag_id}/{self.run_id}/{self.task_id}{_shown(self.map_index)}"


def run_ref(name: str, marker: str) -> RunRef:
    """Return the run of that name and marker; its name is a generated one if it was made from this marker."""
    from dstack_core.integration import RunRef, split_step, step_ref

    first, number = split_step(marker)
    generated = [step_ref(RunRef(one, first), number).name for one in _generated_names(first)]
    return RunRef(name, marker, generated=name in generated)


def birth_of(started: datetime | None) -> str:
    """Return what distinguishes DAG runs of one id: six hex digits of the time at which they started."""
    from dstack_core.integration import short_hash

    return short_hash("" if started is None else started.isoformat(), 6)


def _generated_names(marker: str) -> tuple[str, ...]:
    """Return the names that this version and earlier ones generate for a run with that marker."""
    found = _MARKER.fullmatch(marker)
    if found is None:
        return ()
    of = marker[: found.start("try") - 1], int(found["try"]), found["born"]
    return _generated_name(*of), _former_name(*of)


def _generated_name(task: str, try_number: int, born: str) -> str:
    from dstack_core.integration import run_name

    dag_id = task.removeprefix("airflow:").partition("/")[0]
    task_id, _, index = task.rpartition("/")[2].partition("[")
    return run_name([dag_id, task_id], f"{task}/{try_number}#{born}", suffix=index)


def _former_name(task: str, try_number: int, born: str) -> str:
    from dstack_core.integration import short_hash

    return f"af-{short_hash(f'{task}/{try_number}#{born}')}"


def _shown(map_index: int | None) -> str:
    return "" if map_index is None else f"[{map_index}]"


def _with_index(name: str, index: int) -> str:
    """Keep mapped tasks apart where one name was chosen for all of them."""
    return name if name.endswith(f"-{index}") else f"{name}-{index}"
