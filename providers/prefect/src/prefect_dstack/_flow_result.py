"""What a flow returned or raised on its machine, as an artifact of its flow run.

The problem: Prefect returns the result of another process from a result storage that both processes reach. A
user who has a dstack server and a Prefect server has none.

The idea: a hook of the flow pickles the value of its final state into an artifact of type ``result``, which
Prefect's UI does not show. A flow with a result storage of its own needs none of this. ``send_result``,
``with_values`` and ``with_hidden_secrets`` run on the machine, which does not have this package: they are
pickled by value, so they use nothing of this module but each other's arguments.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import Artifact

ARTIFACT_TYPE = "result"
KIND = "dstack"
# The hook runs after Prefect has the final state. A machine with a slow way to the Prefect server needs some
# seconds for the largest result.
_ARRIVAL_SECONDS = 30.0
_PAUSE = 0.2


def send_result(flow: Any, flow_run: Any, state: Any) -> None:
    """Store what the flow returned or raised: a hook of the flow, which runs on the machine."""
    import base64
    import gzip

    import cloudpickle  # type: ignore[import-untyped]  # It has none.
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import ArtifactCreate

    # A Prefect server keeps artifacts in its database; what is larger belongs into a result storage.
    limit = 5_000_000
    data = {"dstack": "result"}
    try:
        value = state.result(raise_on_failure=False, _sync=True)
        packed = base64.b64encode(gzip.compress(cloudpickle.dumps(value))).decode()
        if len(packed) > limit:
            data["error"] = f"expected at most {limit} bytes (pickled and packed), got {len(packed)}"
        else:
            data["value"] = packed
    except Exception as error:
        data["error"] = f"expected a value that can be pickled, got {type(error).__name__}: {error}"
    with get_client(sync_client=True) as client:
        client.create_artifact(ArtifactCreate(type="result", flow_run_id=flow_run.id, data=data))


def with_values(function: Callable[..., Any], values: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a function that calls ``function`` with ``values`` as those of its parameters."""
    import functools
    import inspect

    signature = inspect.signature(function)

    def arguments(args: Any, kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.arguments.update(values)
        return bound

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def acall(*args: Any, **kwargs: Any) -> Any:
            bound = arguments(args, kwargs)
            return await function(*bound.args, **bound.kwargs)

        return acall

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = arguments(args, kwargs)
        return function(*bound.args, **bound.kwargs)

    return call


def with_hidden_secrets(flow: Flow[..., Any]) -> Flow[..., Any]:
    """Return a copy of a flow whose errors hold no secret of the machine's environment.

    A generator keeps its own errors: a machine cannot return its value.
    """
    import functools
    import inspect

    function = flow.fn
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        return flow

    def hidden(error: Exception) -> Exception:
        # That of the machine, where ``_bundle_secrets`` is a module of this name.
        from dstack_flow_secrets import hider  # type: ignore[import-not-found]

        shown: Exception = hider().hide_in_error(error)
        return shown

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def acall(*args: Any, **kwargs: Any) -> Any:
            try:
                return await function(*args, **kwargs)
            except Exception as error:
                if (shown := hidden(error)) is error:
                    raise
            raise shown

        call: Callable[..., Any] = acall
    else:

        @functools.wraps(function)
        def plain(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if (shown := hidden(error)) is error:
                    raise
            raise shown

        call = plain
    flow = flow.with_options()
    flow.fn = call
    return flow


class NoCarriedResult(LookupError):
    """A flow run whose result did not arrive."""


async def read_result(flow_run_id: UUID) -> Any:
    """Return what the flow returned, or the exception that it raised.

    Waits some seconds for it: a final state reaches Prefect before the result does. Raises
    ``NoCarriedResult`` with what to do about it, and what Prefect's client raises.
    """
    deadline = time.monotonic() + _ARRIVAL_SECONDS
    while (found := await newest(flow_run_id, "result")) is None:
        if time.monotonic() >= deadline:
            raise NoCarriedResult(f"result of flow run {flow_run_id}: expected one, got none. See its log.")
        await asyncio.sleep(_PAUSE)
    data: Any = found.data
    if "error" in data:
        raise NoCarriedResult(
            f"result of flow run {flow_run_id}: {data['error']}. Set persist_result=True and a "
            "result_storage that this process reaches too, or return a path."
        )
    return unpack(data["value"])


def unpack(packed: str) -> Any:
    """Return the value that was packed as ``send_result`` does."""
    import cloudpickle

    return cloudpickle.loads(gzip.decompress(base64.b64decode(packed)))


async def newest(flow_run_id: UUID, kind: str) -> Artifact | None:
    """Return the flow run's newest artifact of this package that is a ``kind``. Raises as the client does."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterType
    from prefect.client.schemas.sorting import ArtifactSort

    chosen = ArtifactFilter(
        flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]),
        type=ArtifactFilterType(any_=[ARTIFACT_TYPE]),
    )
    async with get_client() as client:
        found = await client.read_artifacts(artifact_filter=chosen, sort=ArtifactSort.CREATED_DESC)
    return next((item for item in found if isinstance(item.data, dict) and item.data.get(KIND) == kind), None)
