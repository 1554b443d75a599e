"""Start the dstack server with shorter pauses between its background steps.

Run it with the Python of the server's environment; the arguments are those of `dstack`. Nothing but defaults is
changed: how long a pipeline leaves an item alone, and how long it sleeps after finding none. Those names are
private to the server, so whatever is not found keeps its pause, and standard error says so.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

_PIPELINES = "dstack._internal.server.background.pipeline_tasks"
_JOBS_INTERVAL = timedelta(seconds=0.5)
# A stop that arrives while the server works on a run is overwritten by the result of that work, and the run
# goes on. Every pass over the runs is another chance for it, so the runs are not looked at more often than needed.
_RUNS_INTERVAL = timedelta(seconds=1)
_INTERVALS = {
    "jobs_submitted": _JOBS_INTERVAL,
    "jobs_running": _JOBS_INTERVAL,
    "jobs_terminating": _JOBS_INTERVAL,
    "runs": _RUNS_INTERVAL,
}
_FETCH_DELAYS = [0.1, 0.2, 0.5]


def _lower_default(function: Callable[..., Any], name: str, value: object) -> None:
    parameters = [p for p in inspect.signature(function).parameters.values() if p.default is not p.empty]
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    defaults = list(function.__defaults__ or ())
    defaults[positional.index(name)] = value
    function.__defaults__ = tuple(defaults)


def _shorten(module: Any, base: Any, interval: timedelta) -> None:
    own = [value for value in vars(module).values() if inspect.isclass(value)]
    (pipeline,) = (cls for cls in own if issubclass(cls, base.Pipeline) and cls is not base.Pipeline)
    (fetcher,) = (cls for cls in own if issubclass(cls, base.Fetcher) and cls is not base.Fetcher)
    _lower_default(pipeline.__init__, "min_processing_interval", interval)
    if hasattr(fetcher, "_DEFAULT_FETCH_DELAYS"):
        fetcher._DEFAULT_FETCH_DELAYS = _FETCH_DELAYS
    else:
        _lower_default(fetcher.__init__, "fetch_delays", _FETCH_DELAYS)


def shorten_pauses() -> list[str]:
    """Shorten what can be found and return what could not."""
    failures = []
    with contextlib.suppress(ImportError, AttributeError):
        # What the server's own entry point does before anything else is imported.
        importlib.import_module("dstack._internal.server.bootstrap").set_up_process()
    for name, interval in _INTERVALS.items():
        try:
            base = importlib.import_module(f"{_PIPELINES}.base")
            _shorten(importlib.import_module(f"{_PIPELINES}.{name}"), base, interval)
        except (ImportError, AttributeError, ValueError, IndexError) as error:
            failures.append(f"{name}: {error!r}")
    return failures


def main() -> None:
    """Shorten the pauses, then run the command line."""
    for failure in shorten_pauses():
        sys.stderr.write(f"fast_start: keeps the stock pauses of {failure}\n")
    importlib.import_module("dstack._internal.cli.main").main()


if __name__ == "__main__":
    main()
