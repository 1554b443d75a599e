"""What a test lets happen to the next runs of an embedded server: no capacity, lost machines, failed pulls.

Each scenario ends a run as a real server of dstack 0.22.5 does, with its statuses, reasons and messages. They
are looked up when a run needs them (`jobs`, `queries`), so several can apply to one run.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dstack_core import clock
from dstack_core.local.faults import Faults
from dstack_core.local.locations import Places

Kind = Literal["capacity", "interruption", "pull", "stop"]

# How long a real server waits for a machine to come back before it ends the job.
_UNREACHABLE_SECONDS = 120.0
_RATE_LIMIT = "Error response from daemon: toomanyrequests: You have reached your pull rate limit."
_MANIFEST = "manifest unknown"
# Seconds: a hundred years. Much later moments cannot be written as dates.
_LONGEST = 3.2e9


@dataclass
class Scenario:
    """One scenario: `left` is how many more attempts (or stops) it applies to, None: no limit."""

    kind: Kind
    run: str | None
    left: int | None
    seconds: float = 0.0
    noticed_after: float = 0.0
    is_spot: bool = False
    message: str = ""
    until: float | None = None

    def applies_to(self, name: str) -> bool:
        """Return whether it applies to a run: it names the run, or a part of its name between dashes."""
        return self.run is None or f"-{self.run}-" in f"-{name}-"

    def __str__(self) -> str:
        names = {
            "capacity": "capacity_after",
            "interruption": "interrupt_after" if self.is_spot else "lose_machine",
            "pull": "fail_pull",
            "stop": "forget_stop",
        }
        of = "" if self.run is None else f" of run {self.run!r}"
        return f"{names[self.kind]}{of}"


class Scenarios:
    """The scenarios of a server; safe to use from any thread. All times are in seconds of `clock.monotonic`.

    They can be combined: each applies when its moment comes. `run` limits one to runs of that name: the name
    itself, or a part of it between dashes (``"train"`` is also ``nightly-train-9k2f01xq``, a name that an
    engine generated). `times` is how many attempts it applies to, oldest scenario first.
    """

    def __init__(self, faults: Faults, places: Places) -> None:
        self._faults = faults
        self._places = places
        self._lock = threading.Lock()
        self._scenarios: list[Scenario] = []

    def capacity_after(self, seconds: float, *, run: str | None = None) -> None:
        """Offer no machine for some time, from the first attempt of such a run on.

        Every attempt in that time fails with ``failed_to_start_due_to_no_capacity``. The server tries a run
        again only if it has ``retry`` for ``no-capacity``, as long as its duration allows; any other run
        fails at once, and so does each new try of the engine until the time has passed.

        Args:
            seconds: How long there is no capacity.
            run: The runs it applies to. Default: all.

        Raises:
            ValueError: `seconds` is not a positive number, or `run` is not a name.
        """
        self._add(Scenario("capacity", _name(run), None, _positive("capacity_after", "seconds", seconds)))

    def interrupt_after(
        self,
        seconds: float,
        *,
        run: str | None = None,
        times: int = 1,
        noticed_after: float = _UNREACHABLE_SECONDS,
    ) -> None:
        """Let the cloud take the spot machine away some seconds after the commands have started.

        The commands are killed without notice. The server ends the job with
        ``interrupted_by_no_capacity`` once it has waited for the machine, and tries it again if the run has
        ``retry`` for ``interruption``. Only spot machines are interrupted: a run that asks for on-demand,
        which is the default, loses its machine instead (``instance_unreachable``), as on a real server. Give
        it ``spot_policy="spot"`` or ``"auto"``.

        Args:
            seconds: Seconds that the commands run.
            run: The runs it applies to. Default: all.
            times: How many attempts are interrupted.
            noticed_after: Seconds until the server gives the machine up; 120 on a real one.

        Raises:
            ValueError: A value is out of its range.
        """
        self._lost("interrupt_after", seconds, run, times, noticed_after, is_spot=True)

    def lose_machine(
        self,
        after: float = 0.0,
        *,
        run: str | None = None,
        times: int = 1,
        noticed_after: float = _UNREACHABLE_SECONDS,
    ) -> None:
        """Let the machine disappear while the commands run.

        The commands are killed, the run still counts as running, and its log is silent. Once the server has
        waited for the machine, it ends the job with ``instance_unreachable``; a run with ``retry`` for
        ``error`` is tried again.

        Args:
            after: Seconds that the commands run.
            run: The runs it applies to. Default: all.
            times: How many attempts lose their machine.
            noticed_after: Seconds until the server gives the machine up; 120 on a real one.

        Raises:
            ValueError: A value is out of its range.
        """
        self._lost("lose_machine", after, run, times, noticed_after, is_spot=False)

    def fail_pull(self, message: str = _RATE_LIMIT, *, run: str | None = None, times: int = 1) -> None:
        """Let the download of the image fail: ``creating_container_error``.

        A run with ``retry`` for ``error`` is tried again.

        Args:
            message: What the registry or Docker reports. Default: a rate limit, which is worth a retry.
                ``"manifest unknown"`` is an image that does not exist.
            run: The runs it applies to. Default: all.
            times: How many attempts fail.

        Raises:
            ValueError: A value is out of its range.
        """
        if not (isinstance(message, str) and message):
            raise ValueError(f"fail_pull: expected a message such as {_MANIFEST!r}, got {message!r}.")
        self._add(Scenario("pull", _name(run), _count("fail_pull", times), message=message))

    def forget_stop(self, *, run: str | None = None, times: int = 1) -> None:
        """Accept a stop request and drop it: the run keeps running, as on a server that is short of CPU.

        Args:
            run: The runs it applies to. Default: all.
            times: How many stop requests are dropped.

        Raises:
            ValueError: A value is out of its range.
        """
        self._add(Scenario("stop", _name(run), _count("forget_stop", times)))

    def slow(self, seconds: float, longest: float | None = None, *, path: str = "") -> None:
        """Delay each reply of the server for all clients and runs until the delay is changed or cleared.

        In virtual time the delay passes at once: clients see later clocks, but no request reaches its
        ``timeout``.

        Args:
            seconds: The delay; 0 ends it.
            longest: Each delay is random between `seconds` and this. Default: `seconds`.
            path: Only requests whose path contains this, such as ``"runs/get"``.

        Raises:
            ValueError: Not 0 <= seconds <= longest, or `path` is not text.
        """
        _seconds("slow", "seconds", seconds)
        if longest is not None:
            _seconds("slow", "longest", longest)
        if not isinstance(path, str):
            raise ValueError(f'slow: expected a part of a path such as "runs/get", got {path!r}.')
        self._faults.slow(seconds, longest, path=path)

    def offer_in(self, regions: Mapping[str, float]) -> None:
        """Offer the machine in these places, at these prices, from now on.

        They replace the server's own `regions`. Offers, plans, runs, fleets and costs use them: a run gets
        the cheapest place that its `backends`, `regions` and `max_price` allow, or fails without capacity.
        Machines that exist keep their place and price.

        Args:
            regions: USD per hour by ``"BACKEND/REGION"``, such as
                ``{"aws/us-east-1": 1.8, "gcp/us-west1": 1.2}``.

        Raises:
            ValueError: A place has another form, a price is below 0, or there is no place.
        """
        if not (isinstance(regions, Mapping) and regions):
            raise ValueError(
                'offer_in: expected a mapping such as {"aws/us-east-1": 1.2}, got '
                f"{regions!r}. For no machine at all, use capacity_after."
            )
        self._places.replace(regions)

    def clear(self) -> None:
        """Remove all scenarios and the delay, and offer the machine in the server's own places."""
        with self._lock:
            self._scenarios.clear()
        self._places.restore()
        self._faults.slow(0)

    @property
    def unused(self) -> list[str]:
        """Return the scenarios that have not applied to anything as often as they should."""
        with self._lock:
            return [str(one) for one in self._scenarios if one.left or (one.left is None and not one.until)]

    def take(self, kind: Kind, name: str) -> Scenario | None:
        """Return the scenario of a kind that applies to a run now, and count it as used."""
        with self._lock:
            for one in self._scenarios:
                if one.kind != kind or not one.applies_to(name):
                    continue
                if one.left is None:
                    # A time without capacity begins with the first attempt that it meets.
                    one.until = one.until or clock.monotonic() + one.seconds
                    if clock.monotonic() < one.until:
                        return one
                    continue
                if one.left:
                    one.left -= 1
                    return one
        return None

    def _lost(
        self, method: str, after: Any, run: str | None, times: Any, noticed_after: Any, *, is_spot: bool
    ) -> None:
        seconds = _seconds(method, "seconds" if is_spot else "after", after)
        noticed = _seconds(method, "noticed_after", noticed_after)
        self._add(
            Scenario("interruption", _name(run), _count(method, times), seconds, noticed, is_spot=is_spot)
        )

    def _add(self, scenario: Scenario) -> None:
        with self._lock:
            self._scenarios.append(scenario)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value <= _LONGEST


def _seconds(method: str, name: str, value: Any) -> float:
    if not _is_number(value) or value < 0:
        raise ValueError(f"{method}: expected {name} of 0 or more, got {value!r}.")
    return float(value)


def _positive(method: str, name: str, value: Any) -> float:
    if not _is_number(value) or value <= 0:
        raise ValueError(f"{method}: expected {name} greater than 0, got {value!r}.")
    return float(value)


def _count(method: str, times: Any) -> int:
    if isinstance(times, bool) or not isinstance(times, int) or times < 1:
        raise ValueError(f"{method}: expected times of 1 or more, got {times!r}.")
    return times


def _name(run: Any) -> str | None:
    if run is not None and not (isinstance(run, str) and run):
        raise ValueError(f'run: expected the name of a run such as "train", got {run!r}.')
    return run
