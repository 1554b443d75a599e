"""What a function in a run returned or raised, from what its run reported."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Iterable, Mapping
from hashlib import sha256
from importlib import import_module
from typing import Any, Literal, TypeAlias

from dstack_core.errors import ConfigurationError
from dstack_core.models.functions import FunctionSkipped, RemoteFunctionError, UnusableFunctionError
from dstack_core.models.outcome import Outcome

Serializer: TypeAlias = Literal["json", "cloudpickle"]
"""How a function and its values travel: as source and JSON, or pickled."""

FORBID_VARIABLE = "DSTACK_FORBID_CLOUDPICKLE"


def report_key(marker: str) -> str:
    """Return the key of what the run with this marker reports of its function: 16 hex digits.

    A function that calls another run's function and prints its log does not report that one's result.
    """
    return sha256(f"frame {marker}".encode()).hexdigest()[:16]


def choose_report(payloads: Iterable[tuple[int, Mapping[str, Any]]], key: str) -> Mapping[str, Any] | None:
    """Return which of the payloads of kind "function" counts, None without one.

    It is one of the newest attempt, the first number of each pair. Of several nodes each may report an error,
    and the first one is the cause of the others.
    """
    own = [(attempt, payload) for attempt, payload in payloads if payload.get("key") == key]
    newest = max((attempt for attempt, _ in own), default=0)
    found = [payload for attempt, payload in own if attempt == newest]
    errors = [payload for payload in found if payload.get("state") not in ("returned", "skipped")]
    return next(iter(errors), found[-1] if found else None)


def value_of(
    payload: Mapping[str, Any],
    outcome: Outcome,
    *,
    name: str,
    serializer: Serializer,
    allow_cloudpickle: bool = True,
) -> Any:
    """Return what the function returned.

    Raises ``RemoteFunctionError``, ``UnusableFunctionError``, ``FunctionSkipped``, or the error of the run
    itself, such as ``RunFailedError`` for a function that exited.
    """
    state = payload.get("state")
    if outcome.status.was_stopped or outcome.no_capacity or payload.get("type") == "KeyboardInterrupt":
        # Being stopped is what a function sees as KeyboardInterrupt.
        outcome.raise_for_status()
    if state == "raised":
        raise RemoteFunctionError.of(name, payload, outcome)
    if state == "unusable":
        raise UnusableFunctionError(f"{name}: {payload.get('reason')}", outcome)
    # Whatever was reported before: a run that failed has no result, as when another of its nodes failed.
    outcome.raise_for_status()
    if state == "skipped":
        raise FunctionSkipped(name, str(payload.get("reason") or ""), outcome)
    value = payload.get("value")
    if serializer == "json":
        # The text of a value with NaN or an infinity, which a message cannot hold otherwise.
        return json.loads(payload["text"]) if "text" in payload else value
    cloudpickle = load_cloudpickle(allow_cloudpickle)
    try:
        return cloudpickle.loads(base64.b64decode(str(value)))
    except Exception as error:
        raise UnusableFunctionError(
            f"{name}: expected a result that Python {sys.version.split()[0]} can unpickle here, "
            f"got {error!r}.",
            outcome,
        ) from error


def load_cloudpickle(allowed: bool = True) -> Any:
    """Return the module cloudpickle. Raises ``ConfigurationError`` if it is forbidden or missing."""
    if os.environ.get(FORBID_VARIABLE, "").lower() not in ("", "0", "false", "off"):
        allowed, switch = False, f"{FORBID_VARIABLE} is set"
    else:
        switch = "allow_cloudpickle is False"
    if not allowed:
        raise ConfigurationError(
            f"serializer: expected 'json', got 'cloudpickle', which is forbidden here: {switch}. Pass plain "
            "values with serializer='json'."
        )
    try:
        return import_module("cloudpickle")
    except ImportError:
        raise ConfigurationError(
            "serializer: expected the package cloudpickle on this machine, got none. Run "
            "`pip install cloudpickle`."
        ) from None
