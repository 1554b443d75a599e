"""See that Prefect interrupts a task it sends no signal to.

A submitted task runs in a thread and learns nothing of a cancellation; its task runner's private events
are the fastest sign. Without them only the slower, public way of ``_probe`` is left, so every access here
allows for their absence.
"""

from __future__ import annotations

from typing import Any


def is_interrupted(task_runner: Any) -> bool:
    """Tell whether the flow's task runner is ending while its tasks still run.

    Any event counts, not only this task's own: a task called inside a submitted one has none.
    """
    events = getattr(task_runner, "_cancel_events", None)
    try:
        return any(event.is_set() for event in list(events.values())) if events else False
    except Exception:
        return False
