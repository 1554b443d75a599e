"""Run tasks of Airflow DAGs on GPUs with dstack."""

from __future__ import annotations

__version__ = "0.1.0"
