"""What Prefect loads to know this collection: its blocks, and its worker, which costs more to import."""

from __future__ import annotations

from prefect_dstack.credentials import DstackCredentials
from prefect_dstack.job_block import DstackRun
from prefect_dstack.worker import DstackWorker

__all__ = ["DstackCredentials", "DstackRun", "DstackWorker"]
