"""Create a fleet for the tasks of a DAG run, and delete it when they are done: for setup and teardown."""

from __future__ import annotations

from airflow_provider_dstack.fleet_group import DstackFleetGroup, dstack_fleet
from airflow_provider_dstack.fleet_operators import DstackDeleteFleetOperator, DstackFleetOperator

__all__ = ["DstackDeleteFleetOperator", "DstackFleetGroup", "DstackFleetOperator", "dstack_fleet"]
