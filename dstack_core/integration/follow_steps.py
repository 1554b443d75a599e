"""Follow a job through its steps: submit a run, follow it, and submit the next one (``fallbacks``)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any

from dstack_core.errors import ConfigurationError
from dstack_core.integration.fallbacks import Fallbacks, Steps
from dstack_core.integration.names import step_ref
from dstack_core.models.events import Event, RunFinished

if TYPE_CHECKING:
    from dstack_core._flow.steps import Flow
    from dstack_core._operations import Operations
    from dstack_core.aio import AsyncClient
    from dstack_core.client import Client
    from dstack_core.configurations import ConfigurationLike
    from dstack_core.integration.attempts import Attempt
    from dstack_core.integration.names import RunRef
    from dstack_core.models.outcome import Outcome
    from dstack_core.models.progress import Progress


def follow_steps(
    client: Client,
    configuration: ConfigurationLike,
    attempt: Attempt,
    fallbacks: Fallbacks,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    *,
    poll_interval: float = 5.0,
    logs: bool = True,
    retry_budget: float = 600.0,
    on_next: Callable[[Outcome, RunRef], None] | None = None,
    sleep: Callable[[float], None] | None = None,
) -> Generator[Event, None, None]:
    """Submit a job, follow its run, and submit it again with the next fallback if no machine was left for it.

    What another process has submitted is found and followed, whichever step it has reached. The numbers of
    attempts count on from step to step. Leaving the iteration stops nothing: stop the run that
    ``attempt.ref`` names.

    Args:
        client: The client of the run's project.
        configuration: The job's configuration.
        attempt: Its ``ref`` is the identity of step 1. It is kept up to date with the step that is followed.
        fallbacks: What the later steps are submitted with.
        options: The submit options of step 1. Of ``max_cost`` a later step gets what is left.
        progress: The ``progress`` of an earlier event, here or in another process, of any step. Default: from
            the start.
        poll_interval: Seconds between two status requests.
        logs: Whether to read the log.
        retry_budget: Seconds for which an unreachable server is retried.
        on_next: Called with the end of a step and the identity of the next one, before that is submitted.
        sleep: A function of seconds, instead of ``time.sleep``; what it raises ends the iteration.

    Yields:
        The events of ``Run.follow`` of all steps, and one ``RunFinished`` at the end. Its outcome is that of
        the last step, with the attempts, the cost and the duration of all.

    Raises:
        ConfigurationError: Input of any step is wrong; nothing was submitted.
        RunNotFoundError: The run of ``progress`` was deleted.
        ServerError: The server errors.

    Example::

        fallbacks = Fallbacks([{"spot_policy": "on-demand"}])
        for event in follow_steps(client, task, Attempt(ref), fallbacks, {"spot_policy": "spot"}):
            print(event)

    Source: PROTOCOL 1.4, 1.6.
    """
    steps = Steps(client, configuration, attempt, fallbacks, options, progress)
    for ref in steps.before():
        found = client.runs.get(ref.name, retry_budget=retry_budget, sleep=sleep)
        steps.add_earlier(ref, found)
    while True:
        ref = steps.begin()
        if steps.resumes:
            run = steps.resumed(client.runs.get(ref.name, retry_budget=retry_budget, sleep=sleep))
        else:
            try:
                run = client.runs.submit(
                    configuration,
                    ref.name,
                    marker=ref.marker,
                    retry_budget=retry_budget,
                    sleep=sleep,
                    **steps.options,
                )
            except ConfigurationError as error:
                yield steps.refused(error)
                return
        steps.seen(run)
        followed = run.follow(
            steps.progress, poll_interval=poll_interval, logs=logs, retry_budget=retry_budget, sleep=sleep
        )
        with closing(followed):
            for event in followed:
                if isinstance(event, RunFinished):
                    ended = steps.end(event, on_next)
                    if ended is not None:
                        yield ended
                        return
                else:
                    yield steps.counted(event)


async def afollow_steps(
    client: AsyncClient,
    configuration: ConfigurationLike,
    attempt: Attempt,
    fallbacks: Fallbacks,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    *,
    poll_interval: float = 5.0,
    logs: bool = True,
    retry_budget: float = 600.0,
    on_next: Callable[[Outcome, RunRef], None] | None = None,
    sleep: Callable[[float], Awaitable[None]] | None = None,
) -> AsyncGenerator[Event, None]:
    """Submit and follow a job with fallbacks: the twin of ``follow_steps``, which has the details.

    Args:
        client: The client of the run's project.
        configuration: The job's configuration.
        attempt: Its ``ref`` is the identity of step 1. It is kept up to date with the step that is followed.
        fallbacks: What the later steps are submitted with.
        options: The submit options of step 1. Of ``max_cost`` a later step gets what is left.
        progress: The ``progress`` of an earlier event, of any step.
        poll_interval: Seconds between two status requests.
        logs: Whether to read the log.
        retry_budget: Seconds for which an unreachable server is retried.
        on_next: Called with the end of a step and the identity of the next one.
        sleep: An async function of seconds, instead of ``asyncio.sleep``.

    Yields:
        The events of all steps, and one ``RunFinished`` at the end.

    Raises:
        ConfigurationError: Input of any step is wrong; nothing was submitted.
        RunNotFoundError: The run of ``progress`` was deleted.
        ServerError: The server errors.
    """
    steps = Steps(client, configuration, attempt, fallbacks, options, progress)
    for ref in steps.before():
        found = await client.runs.get(ref.name, retry_budget=retry_budget, sleep=sleep)
        steps.add_earlier(ref, found)
    while True:
        ref = steps.begin()
        if steps.resumes:
            run = steps.resumed(await client.runs.get(ref.name, retry_budget=retry_budget, sleep=sleep))
        else:
            try:
                run = await client.runs.submit(
                    configuration,
                    ref.name,
                    marker=ref.marker,
                    retry_budget=retry_budget,
                    sleep=sleep,
                    **steps.options,
                )
            except ConfigurationError as error:
                yield steps.refused(error)
                return
        steps.seen(run)
        followed = run.follow(
            steps.progress, poll_interval=poll_interval, logs=logs, retry_budget=retry_budget, sleep=sleep
        )
        async with aclosing(followed):
            async for event in followed:
                if isinstance(event, RunFinished):
                    ended = steps.end(event, on_next)
                    if ended is not None:
                        yield ended
                        return
                else:
                    yield steps.counted(event)


def newest_step(
    client: Client,
    ref: RunRef,
    fallbacks: Fallbacks,
    *,
    retry_budget: float | None = None,
    sleep: Callable[[float], None] | None = None,
) -> RunRef:
    """Return the newest step of a job that has a run: what a process that did not follow it has to stop.

    Args:
        client: The client of the run's project.
        ref: The identity of step 1.
        fallbacks: Those that the job was submitted with.
        retry_budget: Seconds to retry an unreachable server in each request; None: the client's.
        sleep: A function of seconds, instead of ``time.sleep``.

    Returns:
        The identity of that run; ``ref`` if no step has one.

    Raises:
        ServerError: The server errors.
    """
    from dstack_core import _drive

    return _drive.run(_newest(client._operations, ref, fallbacks, retry_budget), client._transport, sleep)


async def anewest_step(
    client: AsyncClient,
    ref: RunRef,
    fallbacks: Fallbacks,
    *,
    retry_budget: float | None = None,
    sleep: Callable[[float], Awaitable[None]] | None = None,
) -> RunRef:
    """Return the newest step of a job that has a run: the twin of ``newest_step``, which has the details.

    Args:
        client: The client of the run's project.
        ref: The identity of step 1.
        fallbacks: Those that the job was submitted with.
        retry_budget: Seconds to retry an unreachable server in each request; None: the client's.
        sleep: An async function of seconds, instead of ``asyncio.sleep``.

    Returns:
        The identity of that run; ``ref`` if no step has one.

    Raises:
        ServerError: The server errors.
    """
    from dstack_core import _adrive

    flow = _newest(client._operations, ref, fallbacks, retry_budget)
    return await _adrive.arun(flow, client._transport, sleep)


def _newest(
    operations: Operations, ref: RunRef, fallbacks: Fallbacks, retry_budget: float | None
) -> Flow[RunRef]:
    for number in range(fallbacks.last, 1, -1):
        step = step_ref(ref, number)
        found = yield from operations.get(step.name, retry_budget=retry_budget)
        if found is not None and found.marker == step.marker:
            return step
    return ref
