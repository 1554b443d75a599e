"""A wrong value of an option that both hosts have gets the same message in both."""

from __future__ import annotations

from pathlib import Path

import pytest

PROVIDERS = Path(__file__).parent.parent.parent / "providers"


@pytest.mark.parametrize("host", ["airflow", "prefect"])
def test_a_wrong_log_budget_gets_the_same_message_in_both_hosts(host: str) -> None:
    # The hosts cannot share an environment, so the source is read; each host's tests call it.
    source = "".join(path.read_text() for path in (PROVIDERS / host / "src").rglob("*.py"))
    assert "bytes of log, 0 or more, or None for all of it" in source
