"""A task group whose tasks run between a setup and a teardown task of its own."""

from __future__ import annotations

from typing import Any, Self

from airflow.sdk import TaskGroup

GROUP_OPTIONS = ("tooltip", "ui_color", "ui_fgcolor", "prefix_group_id", "parent_group", "default_args")


class SetupGroup(TaskGroup):
    """A task group with a setup task ``create`` and a teardown task ``delete``."""

    create: Any
    delete: Any

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.group_id!r})"

    def __enter__(self) -> Self:
        """Begin the group: tasks that are made from here on run after ``create`` and before ``delete``."""
        super().__enter__()
        if hasattr(self, "delete") and self.delete.is_teardown:
            self.delete.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """End the group."""
        if hasattr(self, "delete") and self.delete.is_teardown:
            self.delete.__exit__(*error)
        super().__exit__(*error)  # type: ignore[no-untyped-call]
