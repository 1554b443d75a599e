"""Where the Airflow versions that are tested keep what the tests use, and what older ones lack."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any

import pytest
from airflow import __version__


def _one_of(*places: tuple[str, str]) -> Any:
    for module, name in places:
        with suppress(ImportError, AttributeError):
            return getattr(import_module(module), name)
    raise ImportError(f"none of {places}")


# The second place is Airflow 3.1's.
TaskDeferred = _one_of(("airflow.sdk.exceptions", "TaskDeferred"), ("airflow.exceptions", "TaskDeferred"))
DagBag = _one_of(("airflow.dag_processing.dagbag", "DagBag"), ("airflow.models.dagbag", "DagBag"))
# What makes plain data of a DAG, and a DAG of that.
DagSerialization = _one_of(
    ("airflow.serialization.serialized_objects", "DagSerialization"),
    ("airflow.serialization.serialized_objects", "SerializedDAG"),
)
__all__ = ["MINOR", "DagBag", "DagSerialization", "TaskDeferred", "needs_3_2"]

MINOR = tuple(int(part) for part in __version__.split(".")[:2])
# The table "Versions of Airflow" in docs/airflow.md names each of these.
needs_3_2 = pytest.mark.skipif(MINOR < (3, 2), reason="Airflow has this for providers since 3.2")
