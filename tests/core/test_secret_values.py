"""The values of a run's environment that a log must not show."""

from __future__ import annotations

import pytest

from dstack_core import secret_values


@pytest.mark.parametrize("value", ["hunter22", "hf_abcdef", "12345a", "truest", "-----BEGIN\nKEY-----"])
def test_what_may_be_a_secret_is_hidden(value: str) -> None:
    assert list(secret_values([value])) == [value]


@pytest.mark.parametrize("value", [None, "", "main", "12345", "-0.00001", "1e-10", "false", "FALSE"])
def test_what_is_plain_stays_readable(value: str | None) -> None:
    assert list(secret_values([value])) == []


def test_order_is_kept() -> None:
    assert list(secret_values(["first-one", "1", None, "second-one"])) == ["first-one", "second-one"]
