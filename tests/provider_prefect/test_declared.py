"""What the sources import without declaring it comes with what they declare."""

from __future__ import annotations

from tests.core.test_declared import HOSTS_BRING
from tests.declared import always_brought


def test_the_host_brings_what_is_not_declared() -> None:
    assert always_brought("prefect") >= HOSTS_BRING["providers/prefect"]
