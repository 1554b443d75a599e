"""An embedded server with what tests assert about it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from dstack_core.local import LocalServer, Scenarios, SeenRun

if TYPE_CHECKING:
    from dstack_core.client import Client

# What a message shows: lines of a log, and characters of a value.
_MOST_LINES = 20
_LONGEST_VALUE = 200


class DstackServer:
    """The embedded dstack server of a test: where it is, what it saw, and assertions on that.

    The fixtures `dstack_server`, `dstack_server_module` and `dstack_server_session` return one. Without
    pytest, use it as a context manager.

    Args:
        local: The server to use. Default: a new ``LocalServer()``.

    Example:
        >>> def test_training(dstack_server):
        ...     train()
        ...     dstack_server.assert_one_run_per_try()
        ...     assert dstack_server.run("train").log == ("trained",)
    """

    def __init__(self, local: LocalServer | None = None) -> None:
        self._local = LocalServer() if local is None else local
        self._first_run = 0
        self._first_request = 0

    def __repr__(self) -> str:
        return f"DstackServer({self._local!r})"

    def __enter__(self) -> Self:
        self._local.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._local.stop()

    @property
    def local(self) -> LocalServer:
        """The `LocalServer`, with its faults."""
        return self._local

    @property
    def url(self) -> str:
        """The address of the server."""
        return self._local.url

    @property
    def project(self) -> str:
        """The name of its one project."""
        return self._local.project

    @property
    def token(self) -> str:
        """The token of its one user."""
        return self._local.token

    @property
    def scenarios(self) -> Scenarios:
        """What happens to the next runs; the fixture `dstack_scenario` returns it, too."""
        return self._local.scenarios

    def client(self) -> Client:
        """Return a new client of this server."""
        return self._local.client()

    def forget(self) -> None:
        """Begin anew: the runs and requests so far no longer count, and no scenario is left."""
        self._first_run += len(self.runs)
        self._first_request = len(self._local.requests)
        self._local.scenarios.clear()
        self._local.faults.clear()

    @property
    def runs(self) -> list[SeenRun]:
        """The runs that were submitted, as they are now, oldest first."""
        return self._local.runs[self._first_run :]

    @property
    def submitted(self) -> list[Mapping[str, Any]]:
        """The configurations as they were submitted, oldest first."""
        return [run.configuration for run in self.runs]

    @property
    def stopped(self) -> list[str]:
        """The names of the runs that a stop request named, in the order of their submission."""
        return [run.name for run in self.runs if run.stop_requests]

    @property
    def unfinished(self) -> list[SeenRun]:
        """The runs that have not ended and are not stopping."""
        return [run for run in self.runs if not (run.finished or run.stopping)]

    def requests(self, path: str = "") -> int:
        """Return how many requests came whose path contains `path`, such as ``"runs/apply"``."""
        return sum(path in request.path for request in self._local.requests[self._first_request :])

    def run(self, name: str | None = None) -> SeenRun:
        """Return one run.

        Args:
            name: Its name, or a part of it between dashes: ``"train"`` finds ``nightly-train-9k2f01xq``.
                Default: the only run.

        Raises:
            AssertionError: Not exactly one run was submitted that fits; the message lists all.
        """
        found = [run for run in self.runs if name is None or f"-{name}-" in f"-{run.name}-"]
        wanted = "one run" if name is None else f"one run {name!r}"
        _check(len(found) == 1, f"Expected {wanted}, got {len(found)}.", self.runs)
        return found[0]

    def assert_one_run_per_try(self) -> None:
        """Check that no try of a task or flow run submitted two runs.

        Raises:
            AssertionError: One did; the message lists its runs.
        """
        for marker in {run.marker for run in self.runs if run.marker}:
            runs = [run for run in self.runs if run.marker == marker]
            _check(len(runs) == 1, f"Expected one run for the try {marker}, got {len(runs)}.", runs)

    def assert_nothing_left(self) -> None:
        """Check that each run has ended or is stopping.

        Raises:
            AssertionError: One has not; the message lists them.
        """
        left = self.unfinished
        _check(not left, f"Expected no unfinished run, got {len(left)}.", left)

    def assert_submitted(self, name: str | None = None, **expected: Any) -> SeenRun:
        """Check a run's configuration as it was submitted, and return the run.

        Args:
            name: As for `run`.
            **expected: Keys of the configuration and their values, such as ``max_price=2.0``. The first
                of the ``commands`` may be one that the client puts in front, for reports.

        Raises:
            AssertionError: There is no such run, or a value differs. A message never quotes ``env``.
        """
        run = self.run(name)
        for key, value in expected.items():
            found = run.configuration.get(key)
            shown = "another value"
            if key not in ("env", "registry_auth"):
                shown = f"{_short(found)} instead of {_short(value)}"
            _check(found == value, f"Run {run.name} was submitted with {key}: {shown}.", [])
        return run

    def assert_log(self, line: str, name: str | None = None) -> None:
        """Check that a run wrote a line to its log.

        Args:
            line: The whole line.
            name: As for `run`.

        Raises:
            AssertionError: It did not; the message shows the end of the log.
        """
        run = self.run(name)
        end = "\n".join(f"  {each}" for each in run.log[-_MOST_LINES:]) or "  (nothing)"
        if line not in run.log:
            raise AssertionError(f"Expected the line {line!r} in the log of run {run}. Its end:\n{end}")

    def assert_scenarios_happened(self) -> None:
        """Check that each scenario applied as often as it should, so that the test tested something.

        Raises:
            AssertionError: One did not; the message names it.
        """
        unused = ", ".join(self.scenarios.unused)
        _check(not unused, f"Expected every scenario to happen, got none of: {unused}.", self.runs)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _check(is_true: bool, message: str, runs: list[SeenRun]) -> None:
    if not is_true:
        shown = "".join(f"\n  {run}" for run in runs)
        raise AssertionError(f"{message}{' Runs:' if shown else ''}{shown}")


@contextlib.contextmanager
def environment(server: DstackServer) -> Iterator[None]:
    """Point the variables that the client, Airflow and Prefect read at a server, and restore them."""
    connection = {
        "conn_type": "dstack",
        "host": server.url,
        "login": server.project,
        "password": server.token,
    }
    values = {
        "DSTACK_SERVER_URL": server.url,
        "DSTACK_PROJECT": server.project,
        "DSTACK_TOKEN": server.token,
        "AIRFLOW_CONN_DSTACK_DEFAULT": json.dumps(connection),
    }
    # An address for browsers belongs to another server.
    names = [*values, "DSTACK_UI_URL"]
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(values)
    os.environ.pop("DSTACK_UI_URL", None)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
