"""The submit options are declared once: every call takes all of them, and each changes what is sent."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

import dstack_core as dstack
from dstack_core._operations import Operations
from dstack_core._wire.api import Api
from dstack_core._wire.spec import run_spec
from dstack_core.models import options as declared
from tests.option_values import CONFIGURATION, VALUES, write_profiles

OPTIONS = dstack.SubmitOptions.__optional_keys__
# Parameters of a call that do not belong to the submit options, each with its reason.
NO_OPTIONS = {
    "self": "the collection",
    "configuration": "what is submitted",
    "run_name": "which run it is; a plan needs none",
    "verify_ports": "a check on this machine, documented as a parameter; a plan binds no port",
    "marker": "who owns the run",
    "retry_budget": "how this call waits",
    "timeout": "how this call waits",
    "sleep": "how this call waits; another type in the async twin",
    "on_event": "how this call reports",
}
CALLS = [
    getattr(kind, name)
    for kind in (dstack.RunCollection, dstack.AsyncRunCollection)
    for name in ("submit", "apply", "plan")
]
ALL_CALLS = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__qualname__)
TASK = dstack.Task(commands=["true"])


class Reached(Exception):
    """A signal that the session was called; it ends the call before anything is sent."""


def parameters_of(call: Callable[..., Any]) -> list[str]:
    """Return the names of a call's parameters, including those of an unpacked ``TypedDict``."""
    names: list[str] = []
    for name, found in inspect.signature(call).parameters.items():
        if found.kind is not found.VAR_KEYWORD:
            names.append(name)
            continue
        unpacked = found.annotation.removeprefix("Unpack[").removesuffix("]")
        names += getattr(declared, unpacked).__optional_keys__
    return names


def client_of(call: Callable[..., Any]) -> Any:
    kind = dstack.AsyncClient if inspect.iscoroutinefunction(call) else dstack.Client
    return kind(server_url="http://127.0.0.1:9", project_name="main", user_token="t")


def given_to_session(call: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    """Return the options that the call passes to the session, which sends them."""
    seen: list[Any] = []

    def reach(self: Operations, configuration: Any, *positional: Any, **named: Any) -> Any:
        seen.append(positional[-1])
        raise Reached

    monkeypatch.setattr(Operations, "submit", reach)
    monkeypatch.setattr(Operations, "plan", reach)
    with pytest.raises(Reached):
        asyncio.run(getattr(client_of(call).runs, call.__name__)(TASK, **options))
    return {name: value for name, value in seen[-1].items() if value is not None}


def test_every_option_has_a_value_for_the_tests() -> None:
    assert set(VALUES) == OPTIONS


@ALL_CALLS
def test_every_call_has_every_option_and_nothing_else(call: Callable[..., Any]) -> None:
    names = parameters_of(call)
    assert len(names) == len(set(names))
    assert set(names) - set(NO_OPTIONS) == OPTIONS


@pytest.mark.parametrize("name", sorted(OPTIONS))
@ALL_CALLS
def test_every_call_passes_every_option_on(
    call: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert given_to_session(call, monkeypatch, **{name: VALUES[name]}) == {name: VALUES[name]}


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_every_option_changes_what_is_sent(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_profiles(tmp_path)
    monkeypatch.chdir(tmp_path)
    session = Operations(Api("http://server", "main"), 30)

    def sent(given: dict[str, Any]) -> dict[str, Any]:
        return run_spec(*session._prepared(CONFIGURATION, cast(dstack.SubmitOptions, given)))

    assert sent({name: VALUES[name]}) != sent({}) == sent({name: None})


@ALL_CALLS
def test_an_option_that_does_not_exist_is_named_before_any_request(call: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"^max_pric: expected one of the options args, .*, got max_pric\. "):
        asyncio.run(getattr(client_of(call).runs, call.__name__)(TASK, max_pric=2))


def test_mypy_refuses_a_wrong_option_and_a_wrong_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use ``warn_unused_ignores``, which makes each comment below a check by mypy."""
    with dstack.Client(server_url="http://127.0.0.1:9", project_name="main", user_token="t") as client:
        for wrong in (
            lambda: client.runs.submit(TASK, max_pric=2),  # type: ignore[call-arg]
            lambda: client.runs.apply(TASK, max_pric=2),  # type: ignore[call-arg]
            lambda: client.runs.plan(TASK, max_pric=2),  # type: ignore[call-arg]
        ):
            with pytest.raises(TypeError, match="max_pric"):
                wrong()
        for wrong in (
            lambda: client.runs.submit(TASK, profile=3),  # type: ignore[arg-type]
            lambda: client.runs.apply(TASK, backends="aws"),  # type: ignore[arg-type]
            lambda: client.runs.plan(TASK, max_price=[2]),  # type: ignore[arg-type]
        ):
            with pytest.raises(dstack.ConfigurationError):
                wrong()
