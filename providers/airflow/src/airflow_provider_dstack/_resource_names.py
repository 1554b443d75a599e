"""The names and marks of what tasks create beside runs: fleets and volumes.

Every try of a task has the same name and mark, so that a retry finds what the try before it created. A mark
reads ``airflow:dag/run/task[index]/fleet#born``; ``born`` is that of ``_names``, which keeps two Airflows and
a DAG run that was deleted and made again apart. A default name is made of the DAG's and the task's ids and a
hash of the mark, so two DAG runs never share one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from airflow_provider_dstack._compat import AirflowFailException
from airflow_provider_dstack._names import birth_of

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import Context

Kind = Literal["fleet", "volume", "secret"]

_MARK = re.compile(
    r"airflow:(?P<dag>[^/]+)/(?P<run>.+)/(?P<task>[^/\[]+)(?:\[(?P<index>\d+)\])?"
    r"/(?P<kind>fleet|volume)#(?P<born>[0-9a-f]{6})"
)


@dataclass(frozen=True, slots=True)
class ResourceOwner:
    """The task instance that owns a fleet or volume: each of its tries does."""

    kind: str
    dag_id: str
    run_id: str
    task_id: str
    map_index: int | None
    born: str

    @classmethod
    def of(cls, context: Context, kind: Kind, task_id: str | None = None) -> ResourceOwner:
        """Return the owner for the task instance of a context, or for another task of its DAG run."""
        ti = context["ti"]
        index = ti.map_index if ti.map_index is not None and ti.map_index >= 0 else None
        started = getattr(context.get("dag_run"), "start_date", None)
        return cls(kind, ti.dag_id, ti.run_id, task_id or ti.task_id, index, birth_of(started))

    @classmethod
    def read(cls, mark: str | None) -> ResourceOwner | None:
        """Return the owner that a mark names, None for a mark that no Airflow task wrote."""
        found = _MARK.fullmatch(mark or "")
        if found is None:
            return None
        index = None if found["index"] is None else int(found["index"])
        return cls(found["kind"], found["dag"], found["run"], found["task"], index, found["born"])

    @property
    def try_number(self) -> int:
        """The first try's, which stands for all of them."""
        return 1

    def __str__(self) -> str:
        index = "" if self.map_index is None else f"[{self.map_index}]"
        return f"{self.dag_id}/{self.run_id}/{self.task_id}{index}"

    @property
    def mark(self) -> str:
        """The mark by which every try recognizes what is its own."""
        from dstack_core.integration import make_marker

        return make_marker("airflow", f"{self}/{self.kind}#{self.born}")

    def name(self, chosen: str | None) -> str:
        """Return the chosen name, with the map index of a mapped task behind it, or one of this DAG run."""
        from dstack_core.integration import run_name

        if not chosen:
            index = "" if self.map_index is None else str(self.map_index)
            return run_name([self.dag_id, self.task_id.rpartition(".")[2]], self.mark, suffix=index)
        if self.map_index is None or chosen.endswith(f"-{self.map_index}"):
            return chosen
        return f"{chosen}-{self.map_index}"


def setup_id(context: Context, field: str, task_id: object) -> str:
    """Return the id of the setup that a teardown names. Raises ``AirflowFailException``: the DAG lacks it."""
    dag = context.get("dag")
    if dag is not None and task_id not in dag.task_ids:
        raise AirflowFailException(
            f"{field}: expected a task of DAG {dag.dag_id}, got {task_id!r}. Its tasks are "
            f"{', '.join(sorted(dag.task_ids))}."
        )
    return str(task_id)
