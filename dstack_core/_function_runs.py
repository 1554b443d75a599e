"""What ``client.functions`` has in common, sync and async: preparing a call, and reading how its run ended.

A call becomes a task whose files are the function and its arguments. They are packed into memory before
anything is sent, so the folder they are written to is gone by then.

Invariant: who calls ``run`` gets a value or an error, and no run that keeps running: whatever ends the call
stops the run, also while it is submitted and it is unknown whether the server has it.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

from dstack_core._drive import log_event
from dstack_core._flow.retry import within
from dstack_core._flow.steps import Flow, Sleep, observing
from dstack_core._flow.stop_options import Check, StopOptions, StopTarget, Until
from dstack_core._flow.submit import random_marker
from dstack_core._function.call import FunctionCall
from dstack_core._function.result import choose_report, late_read_pauses, report_key
from dstack_core._operations import Operations
from dstack_core._run_base import RunBase
from dstack_core._wire.http_messages import Call
from dstack_core._wire.runs import RunSnapshot
from dstack_core.configurations import load_configuration
from dstack_core.errors import ConfigurationError
from dstack_core.models.events import ContactLost, ContactRestored, Event, LogLines, Reported
from dstack_core.models.options import SubmitOptions, check_callable, check_seconds
from dstack_core.models.outcome import NoResultError, Outcome
from dstack_core.models.reports import ReportLimits
from dstack_core.models.stops import StopResult

RunT = TypeVar("RunT", bound=RunBase[Any])

# How long an interrupted call takes to stop its run: a server that is restarted answers again by then, and
# a user waits for the prompt.
STOP_SECONDS = 30.0

_PACK = (
    "serializer",
    "modules",
    "requirements",
    "cache_dir",
    "torchrun",
    "max_result_bytes",
    "allow_cloudpickle",
)
_TASK = ("image", "python", "commands", "registry_auth", "nodes")
_NOT_IN_NAMES = re.compile(r"[^a-z0-9]+")

_log = logging.getLogger("dstack_core")


@dataclass(frozen=True, slots=True)
class PreparedCall:
    """A call that was checked and packed, with the identity of its run."""

    call: FunctionCall
    name: str
    marker: str
    generated: bool
    given: Mapping[str, Any] = field(repr=False)
    _sent: list[bool] = field(default_factory=list, repr=False)

    @property
    def key(self) -> str:
        """The key of what the run reports."""
        return report_key(self.marker)

    def submit(self, operations: Operations) -> Flow[RunSnapshot]:
        """Write and pack the files now, which blocks; the flow submits."""
        given = self.given
        base = given.get("configuration")
        with TemporaryDirectory(prefix="dstack-function-") as temporary:
            folder = Path(temporary) / "function"
            self.call.write(folder, self.key)
            task = self.call.configuration(
                folder,
                self.key,
                None if base is None else load_configuration(base),
                **{name: given[name] for name in _TASK},
            )
            options: Any = {name: given[name] for name in SubmitOptions.__optional_keys__ if name in given}
            flow = operations.submit(
                task,
                self.name,
                options,
                verify_ports=True,
                marker=self.marker,
                retry_budget=given.get("retry_budget"),
            )
        return observing(flow, self._see)

    @property
    def may_exist(self) -> bool:
        """Whether the run may exist: a request that submits it was sent."""
        return bool(self._sent)

    def _see(self, step: object) -> None:
        if isinstance(step, Call) and step.request.path.endswith("/runs/apply"):
            self._sent.append(True)

    def stop(self, operations: Operations, run_id: str | None) -> Flow[StopResult]:
        """Stop the run because its call was interrupted, and log what is known; raises no server error."""
        # No other run has a generated name. Without an id, the request that submits may still be under way.
        check = Check.NEVER if self.generated else Check.ALWAYS if run_id is None else Check.IF_ANSWERED
        options = StopOptions(
            operations.clock,
            timeout=STOP_SECONDS,
            check=check,
            until=Until.STOPPING,
            may_appear=run_id is None,
        )
        api = operations.api
        page = api.runs_url() if run_id is None else api.run_url(run_id)
        _log.warning("Stopping run %s, since its call was interrupted: %s", self.name, page)
        try:
            result = yield from operations.stop_owned(StopTarget(self.name, self.marker, run_id), options)
        except GeneratorExit:
            _log.error("Run %s may keep running: its stop was interrupted. See %s", self.name, page)
            raise
        if not result.is_safe:
            _log.error("Run %s may keep running: its stop was not confirmed. See %s", self.name, page)
        return result


def prepare(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> PreparedCall:
    """Check and pack a call; reads files, which blocks.

    ``given`` are the options by name, ``defaults`` their defaults. Raises ``ConfigurationError``.
    """
    _refuse_shared_names(function, args, kwargs, given, defaults)
    check_seconds("poll_interval", given.get("poll_interval"), above=True)
    for each in ("on_log", "on_event"):
        check_callable(each, given.get(each))
    call = FunctionCall.pack(function, args, kwargs, **{name: given[name] for name in _PACK})
    name = given["run_name"]
    if name is None:
        base = _NOT_IN_NAMES.sub("-", call.name.lower()).strip("-")[:28].strip("-")
        # The server takes 41 characters, a letter first.
        name = f"{base if base[:1].isalpha() else 'function'}-{uuid.uuid4().hex[:10]}"
    marker = given["marker"] or random_marker()
    return PreparedCall(call, name, marker, given["run_name"] is None, given)


def options_of(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options among the local names of ``run`` or ``submit``."""
    return {
        name: value for name, value in names.items() if name not in ("self", "function", "args", "kwargs")
    }


@functools.cache
def defaults_of(method: Callable[..., Any]) -> Mapping[str, Any]:
    """Return the options of ``run`` or ``submit`` with their defaults."""
    parameters = inspect.signature(method).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


def _refuse_shared_names(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> None:
    """Raise ``ConfigurationError`` where an option could also be meant for the function."""
    try:
        signature = inspect.signature(function)
        bound = signature.bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        # The call itself is wrong, which is reported later.
        return
    fixed = function.keywords if isinstance(function, functools.partial) else {}
    for name, parameter in signature.parameters.items():
        if name not in defaults or name in bound or name in fixed:
            continue
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            continue
        # ``is`` first: comparing may fail, such as for arrays.
        value, default = given[name], defaults[name]
        if parameter.default is parameter.empty or not (value is default or value == default):
            shown = getattr(function, "__name__", "function")
            raise ConfigurationError(
                f"{name}: expected an option of this call, got a name that {shown} has as a parameter, too. "
                f"Pass functools.partial({shown}, {name}=...) as the function; {name}= is the option."
            )


class FunctionRunBase(Generic[RunT]):
    """A function that runs; ``run`` is its run."""

    def __init__(self, call: FunctionCall, key: str, run: RunT) -> None:
        self._call = call
        self._key = key
        self._run = run

    @property
    def run(self) -> RunT:
        """The run in which the function is called."""
        return self._run

    @property
    def name(self) -> str:
        """The function's name."""
        return self._call.name

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, run={self.run!r})"

    def _reading(
        self, on_log: Callable[[str], None] | None, on_event: Callable[[Event], None] | None
    ) -> Reading:
        check_callable("on_log", on_log)
        check_callable("on_event", on_event)
        return Reading(self._key, on_log, on_event)

    def _wait(
        self,
        reading: Reading,
        timeout: float | None,
        poll_interval: float,
        retry_budget: float,
    ) -> Flow[Outcome]:
        """Follow the run to its end and read what it reported of the function."""
        run, limits = self._run, ReportLimits(max_bytes=self._call.report_bytes)
        waits = run._follow(
            None,
            poll_interval=poll_interval,
            logs=reading.wants_log or run.holds_on_failure,
            retry_budget=retry_budget,
            report_limits=limits,
        )
        outcome = yield from within(waits, run._limit(timeout, "had not finished"))
        reading.ended = True
        # None: a first read, which has ended if the log was followed.
        for pause in (*(() if reading.wants_log else (None,)), *late_read_pauses(outcome)):
            if reading.report is not None:
                break
            if pause is not None:
                yield Sleep(pause)
            yield from run._follow(
                None, poll_interval=poll_interval, logs=True, retry_budget=retry_budget, report_limits=limits
            )
        return outcome

    def _value(self, reading: Reading, outcome: Outcome) -> Any:
        report = reading.report
        if report is not None:
            return self._call.read(report, outcome)
        outcome.raise_for_status()
        raise NoResultError(
            f"{self.name}: run {outcome.run_name} succeeded, but its log holds no result. See {outcome.url}",
            outcome,
        )


@dataclass(slots=True)
class Reading:
    """What was read of a run: it takes the events of following it.

    Once the run has ``ended``, its log is read again for what the function reported; ``on_log`` and
    ``on_event`` get nothing of that.
    """

    key: str
    on_log: Callable[[str], None] | None
    on_event: Callable[[Event], None] | None
    ended: bool = False
    _found: list[tuple[int, Mapping[str, Any]]] = field(default_factory=list, repr=False)

    @property
    def wants_log(self) -> bool:
        """Whether the log is to be read while the run is followed."""
        return self.on_log is not None or self.on_event is not None

    @property
    def report(self) -> Mapping[str, Any] | None:
        """What the run reported of the function, None if nothing was read yet."""
        return choose_report(self._found, self.key)

    def see(self, event: Event) -> None:
        """Take an event."""
        if isinstance(event, Reported) and event.kind == "function":
            self._found.append((event.attempt, event.payload))
            return
        if self.on_event is None:
            log_event(event)
        elif not self.ended or isinstance(event, ContactLost | ContactRestored):
            self.on_event(event)
        if self.on_log is not None and not self.ended and isinstance(event, LogLines):
            for line in event.lines:
                self.on_log(line)
