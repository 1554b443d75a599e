"""Generated replies and configurations, however absurd, raise only our own errors."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import dstack_core as dstack
from dstack_core._wire.api import Api
from dstack_core._wire.http_messages import Call, Reply
from dstack_core._wire.lookups import active_page
from dstack_core._wire.runs import RunSnapshot, outcome_of
from dstack_core.configurations import load_configuration
from dstack_core.errors import DstackError
from tests.core.scripted import recorded, run_json

API = Api("http://server", "main")
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=20),
    st.sampled_from(
        ["", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-01-01", "NaN", "\x00"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
RUN = run_json("done")
LOG_PAGE = {
    "logs": [{"timestamp": "2026-11-23T09:30:00.000001Z", "log_source": "stdout", "message": "YQo="}],
    "next_token": "3",
}
CALLS: list[tuple[Call[Any], Any]] = [
    (API.get_run("train", "id-1"), RUN),
    (API.get_approach("train", "id-1", 0), run_json("running")),
    (API.list_runs(only_active=True), [RUN]),
    (active_page("http://server", "main", None), [RUN]),
    (API.apply({"run_name": "train"}), RUN),
    (API.poll_logs("train", "sub", start_time=None), LOG_PAGE),
    (API.get_release(), {"server_version": "0.22.5"}),
    (API.get_user(), recorded("users_get_my_user_0.22.5")),
    (API.get_user_key(), recorded("users_get_my_user_0.22.5")),
    (API.list_projects(), recorded("projects_list_0.22.5")),
    (API.list_events("id-1", limit=10, after=None), recorded("events_list_0.22.5")),
    (API.find_archive("0" * 64), {"id": "x", "hash": "y"}),
]
LONG = settings(max_examples=40, suppress_health_check=list(HealthCheck))


def places(value: Any) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a JSON value."""
    found: list[tuple[Any, ...]] = [()]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        found += [(key, *rest) for rest in places(item)]
    return found


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """Return a copy with another value at that place."""
    if not place:
        return new
    copied = copy.copy(value)
    copied[place[0]] = changed(copied[place[0]], place[1:], new)
    return copied


def read(call: Call[Any], reply: Reply) -> Any:
    """Read a reply as a flow does; any error but our own fails the test."""
    try:
        return call.parse(reply)
    except DstackError:
        return None


@pytest.mark.parametrize(
    ("call", "good"), CALLS, ids=[call.request.path.rpartition("/")[2] for call, _ in CALLS]
)
@LONG
@given(data=st.data())
def test_a_reply_with_anything_anywhere(call: Call[Any], good: Any, data: st.DataObject) -> None:
    body = good
    for _ in range(data.draw(st.integers(1, 3))):
        body = changed(body, data.draw(st.sampled_from(places(body))), data.draw(VALUES))
    result = read(call, Reply(200, {}, json.dumps(body).encode()))
    if isinstance(result, RunSnapshot):
        assert repr(result)
        if not result.is_active:
            assert outcome_of(result, "url").to_dict()


@LONG
@given(
    status=st.integers(100, 599),
    body=st.one_of(st.binary(max_size=200), VALUES.map(lambda value: json.dumps(value).encode())),
    detail=VALUES,
)
def test_a_refusal_of_any_kind(status: int, body: bytes, detail: Any) -> None:
    for sent in (body, json.dumps({"detail": detail}).encode()):
        for call, _ in CALLS:
            read(call, Reply(status, {"retry-after": "never", "location": "\x00"}, sent))


@pytest.mark.parametrize("depth", [100, 1_000_000])
def test_a_reply_that_is_too_deep_to_be_read(depth: int) -> None:
    for call, _ in CALLS:
        for status in (200, 400):
            read(call, Reply(status, {}, b"[" * depth))


@LONG
@given(configuration=st.dictionaries(st.sampled_from(
    ["type", "name", "commands", "env", "ports", "port", "resources", "retry", "max_duration", "image", "python",
     "files", "repos", "registry_auth", "volumes", "working_dir", "nodes", "max_price", "spot_policy", "probes"]
), VALUES))  # fmt: skip
def test_a_configuration_of_anything(configuration: dict[str, Any]) -> None:
    for kind in ("task", "service", None):
        try:
            load_configuration(configuration | ({"type": kind} if kind else {}))
        except DstackError:
            continue


@pytest.mark.parametrize(
    "model", [dstack.Task, dstack.Service, dstack.Resources, dstack.GPU, dstack.RetryPolicy]
)
@LONG
@given(data=st.data())
def test_models_of_anything(model: Any, data: st.DataObject) -> None:
    fields = data.draw(st.dictionaries(st.sampled_from([*model.model_fields, "other"]), VALUES))
    try:
        model(**fields)
    except DstackError:
        return
    except ValidationError as error:
        pytest.fail(f"not ours: {error}")
