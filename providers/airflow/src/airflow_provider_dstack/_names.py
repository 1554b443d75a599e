"""Name runs so that every try can tell the runs of the tries before it (PROTOCOL 1.4)."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import Context


class RunId(NamedTuple):
    """Mean one run: no other run has this name and this marker."""

    name: str
    marker: str


@dataclass(frozen=True, slots=True)
class TaskNames:
    """Name the runs of one task instance.

    ``task`` is ``airflow:dag/run/task[map_index]``. ``born`` tells a DAG run from one that was deleted and
    made again, and two Airflows that share a project: it is drawn from the time at which the DAG run
    started. The id of the task instance would not do, for Airflow draws it anew for every try.
    ``max_tries`` tells a cleared task from a retried one, for clearing raises it. ``chosen`` is the run
    name that the user wants, or None.
    """

    task: str
    born: str
    try_number: int
    max_tries: int
    retries: int
    chosen: str | None = None

    @classmethod
    def of(cls, context: Context, chosen: str | None = None, retries: int = 0) -> TaskNames:
        """Return the names for the task instance of a context; ``retries`` is the operator's."""
        ti = context["ti"]
        index = ti.map_index if ti.map_index is not None and ti.map_index >= 0 else None
        started = getattr(context.get("dag_run"), "start_date", None)
        return cls(
            task=f"airflow:{ti.dag_id}/{ti.run_id}/{ti.task_id}" + ("" if index is None else f"[{index}]"),
            born=_digest("" if started is None else started.isoformat())[:6],
            try_number=ti.try_number,
            max_tries=ti.max_tries,
            retries=retries,
            chosen=chosen if chosen is None or index is None else _with_index(chosen, index),
        )

    @property
    def run(self) -> RunId:
        """Return the run of this try; its marker reads ``airflow:dag/run/task[3]/2of4#5f1c9a``."""
        return RunId(self.name_in(self.try_number), self.marker_in(self.try_number, self.max_tries))

    @property
    def earlier_tries(self) -> range:
        """Return the numbers of the tries whose run may still matter, the latest first.

        Those are the tries since the task was last cleared, and at least the one before this.
        """
        first = min(self.max_tries - self.retries + 1, self.try_number - 1)
        return range(self.try_number - 1, max(first, 1) - 1, -1)

    def name_in(self, try_number: int) -> str:
        """Return the run name of a try: the chosen one, or ``af-`` and 12 hex digits."""
        return self.chosen or f"af-{_digest(f'{self.task}/{try_number}#{self.born}')[:12]}"

    def marker_in(self, try_number: int, max_tries: int) -> str:
        """Return the marker of a try: what is written on its run to know it again."""
        return f"{self.task}/{try_number}of{max_tries + 1}#{self.born}"

    def read_marker(self, marker: str) -> tuple[int, int] | None:
        """Return ``(try_number, max_tries)`` of a marker of this task instance, None for any other."""
        told = marker.removeprefix(f"{self.task}/").removesuffix(f"#{self.born}").split("of")
        if len(told) != 2 or not all(number.isdecimal() for number in told):
            return None
        try_number, max_tries = int(told[0]), int(told[1]) - 1
        return (try_number, max_tries) if marker == self.marker_in(try_number, max_tries) else None


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _with_index(name: str, index: int) -> str:
    """Keep mapped tasks apart where one name was chosen for all of them."""
    return name if name.endswith(f"-{index}") else f"{name}-{index}"
