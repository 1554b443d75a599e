"""Data that another version of this package wrote can be read, whatever fields it has."""

from __future__ import annotations

from typing import Any

import pytest

from dstack_core import LogCursor, Outcome, Progress, RunStatus

OUTCOME = Outcome(
    run_name="train",
    run_id="id-1",
    project="main",
    status=RunStatus.DONE,
    exit_status=0,
    reason="all_jobs_done",
    message="finished",
    cost=0.5,
    duration=12.0,
    instance="A100",
    backend="aws",
    region="us-east-1",
    price_per_hour=1.2,
    url="http://server/projects/main/runs/id-1",
)


def test_an_outcome_of_a_newer_version_is_read() -> None:
    assert Outcome.from_dict({**OUTCOME.to_dict(), "gpu_hours": 3.0, "nodes": [1, 2]}) == OUTCOME


@pytest.mark.parametrize(
    "field", ["exit_status", "reason", "duration", "instance", "backend", "region", "price_per_hour"]
)
def test_an_outcome_of_an_older_version_is_read(field: str) -> None:
    data = {**OUTCOME.to_dict()}
    del data[field]
    assert getattr(Outcome.from_dict(data), field) is None


def test_an_outcome_keeps_a_status_that_this_version_does_not_know() -> None:
    assert str(Outcome.from_dict({**OUTCOME.to_dict(), "status": "frozen"}).status) == "frozen"


def test_progress_of_a_newer_version_is_read() -> None:
    cursor = LogCursor("2026-11-26T10:00:00Z", 2, "YQ==", True)
    progress = Progress("train", "id-1", "running", {"sub-0": cursor}, 12.0)
    data: dict[str, Any] = progress.to_dict()
    data["cursors"]["sub-0"]["bytes_read"] = 17
    data["reports"] = {"sub-0": 3}
    assert Progress.from_dict(data) == progress


def test_progress_of_an_older_version_is_read() -> None:
    data = {"run_name": "train", "cursors": {"sub-0": {"after": "2026-11-26T10:00:00Z"}}}
    cursor = LogCursor("2026-11-26T10:00:00Z")
    assert Progress.from_dict(data) == Progress("train", cursors={"sub-0": cursor})
