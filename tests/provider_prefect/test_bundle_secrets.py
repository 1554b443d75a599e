"""What hides secrets on the machine of a flow, without any server."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from prefect_dstack._bundle_secrets import VARIABLE, Hider, secrets_here
from prefect_dstack._bundles import secret_parts
from prefect_dstack._secrets import Masking

SECRET = "sk-of-a-machine"


class Frozen(ValueError):
    """An error with a text that cannot be set."""

    def __str__(self) -> str:
        return f"frozen {SECRET}"


@pytest.fixture
def factory() -> Iterator[None]:
    before = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(before)


def test_only_names_and_places_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    env: dict[str, Any] = {
        "API_KEY": SECRET,
        "DB": "postgres://me:hunter22@db",
        "FILLED": "${{ secrets.of_the_server }}",
        "STAGE": "training",
        "MY_TOKEN": None,
        "LICENSE": "a-license-of-a-block",
    }
    monkeypatch.setenv("MY_TOKEN", "token-of-the-caller")
    masking = Masking("secrets", {"LICENSE"})
    parts = secret_parts(env, masking.secrets_in)
    assert {name for name, places in parts.items() if not places} == {
        "API_KEY",
        "FILLED",
        "MY_TOKEN",
        "LICENSE",
    }
    assert "STAGE" not in parts
    assert "hunter22" in [env["DB"][start:end].strip("/@").partition(":")[2] for start, end in parts["DB"]]
    assert SECRET not in str(parts)
    assert secret_parts(env, Masking("none").secrets_in) == {"FILLED": []}


def test_the_values_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, '{"A": [], "B": [[2, 9]], "C": [], "MISSING": []}')
    for name, value in (("A", "first-line\nab\nsecond-line"), ("B", "x:p%40sswd@"), ("C", "abc")):
        monkeypatch.setenv(name, value)
    assert secrets_here() == ["second-line", "first-line", "p%40sswd"[:7], "p@ssw"]
    monkeypatch.delenv(VARIABLE)
    assert secrets_here() == []


@pytest.mark.usefixtures("factory")
def test_log_records_are_masked_before_a_handler_gets_them(caplog: pytest.LogCaptureFixture) -> None:
    Hider([SECRET]).hide_in_logs()
    logger = logging.getLogger("of-a-flow")
    logger.warning("printed %s", SECRET)
    logger.warning("plain %d", 3)
    try:
        raise ValueError(SECRET)
    except ValueError:
        logger.exception("failed")
    assert SECRET not in caplog.text
    assert "printed ***" in caplog.text
    assert "plain 3" in caplog.text
    assert "ValueError: ***" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        ValueError(f"no {SECRET}", {"a": [SECRET]}, SECRET.encode()),
        KeyError(SECRET),
        OSError(2, "no file", SECRET),
        subprocess.CalledProcessError(1, ["curl", SECRET], output=SECRET.encode()),
    ],
)
def test_an_error_keeps_its_type_without_the_secret(error: Exception) -> None:
    try:
        raise error from ValueError(SECRET)
    except Exception as caught:
        shown = Hider([SECRET]).hide_in_error(caught)
    assert shown is error
    everything: list[Any] = [str(shown), repr(shown), vars(shown), shown.args, shown.__cause__]
    assert SECRET not in str(everything)
    assert "***" in str(everything)


def test_an_error_that_cannot_be_changed_is_replaced() -> None:
    shown = Hider([SECRET]).hide_in_error(Frozen())
    assert (type(shown), str(shown)) == (RuntimeError, "Frozen: frozen ***")


def test_without_secrets_nothing_changes() -> None:
    error, before = ValueError(SECRET), logging.getLogRecordFactory()
    hider = Hider([])
    hider.hide_in_logs()
    assert hider.hide_in_error(error) is error
    assert (error.args, logging.getLogRecordFactory()) == ((SECRET,), before)
