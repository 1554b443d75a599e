"""Where the Airflow versions that are tested keep what the tests use, and what older ones lack."""

from __future__ import annotations

from typing import Any

import pytest
from airflow import __version__
from airflow.serialization import serialized_objects

try:
    from airflow.sdk.exceptions import TaskDeferred
except ImportError:
    from airflow.exceptions import TaskDeferred  # type: ignore[attr-defined,no-redef]  # Airflow 3.1
try:
    from airflow.dag_processing.dagbag import DagBag
except ImportError:
    from airflow.models.dagbag import DagBag  # type: ignore[attr-defined,no-redef]  # Airflow 3.1

__all__ = ["DagBag", "DagSerialization", "TaskDeferred", "needs_3_2"]

MINOR = tuple(int(part) for part in __version__.split(".")[:2])
# What makes plain data of a DAG, and a DAG of that.
DagSerialization: Any = getattr(serialized_objects, "DagSerialization", serialized_objects.SerializedDAG)
# The table "Versions of Airflow" in docs/airflow.md names each of these.
needs_3_2 = pytest.mark.skipif(MINOR < (3, 2), reason="Airflow has this for providers since 3.2")
