"""Start the dstack server with shorter pauses between its background steps, and without an image registry.

Run it with the Python of the server's environment; the arguments are those of `dstack`. `RIG_FAST` shortens
pauses and changes nothing else: how long an item is left alone, and how long a step waits for its next turn.
`RIG_IMAGES` replaces the server's requests to an image registry, which tests cannot reach. `RIG_IMPATIENT` lets it
fail a job that it cannot reach or start within about a minute instead of two to ten. The names that this changes
are private to the server, so a name that is not found is skipped and reported on standard error.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

_BACKGROUND = "dstack._internal.server.background"
_JOBS_INTERVAL = timedelta(seconds=0.5)
# If a stop arrives while the server processes a run, the result of that step overwrites it, and the run keeps
# running. Every pass over the runs is another chance for that, so runs are not processed more often than needed.
_RUNS_INTERVAL = timedelta(seconds=1)
_INTERVALS = {
    "jobs_submitted": _JOBS_INTERVAL,
    "jobs_running": _JOBS_INTERVAL,
    "jobs_terminating": _JOBS_INTERVAL,
    "runs": _RUNS_INTERVAL,
}
# Seconds between two fetches of a pipeline, growing while there is nothing to do.
_FETCH_DELAYS = [0.1, 0.2, 0.5]
# Since 0.22 the server waits this long for the last log lines of an aborted job, which never come.
_TERMINATION_DEADLINE = timedelta(seconds=8)
# How long an impatient server tries to reach a job, and how long a job may take to start on two busy cores.
_UNREACHABLE = timedelta(seconds=30)
_STARTING = timedelta(seconds=90)
# Servers before 0.20: how often a task runs, and how long it leaves an item alone (from 0.19 on).
_TASK_INTERVALS = {
    "process_submitted_jobs": _JOBS_INTERVAL,
    "process_running_jobs": _JOBS_INTERVAL,
    "process_terminating_jobs": _JOBS_INTERVAL,
    "process_runs": _RUNS_INTERVAL,
    "process_instances": _RUNS_INTERVAL,
}
_TASK_JITTER = 0.2
# They give a stopped job 15 s before its container is removed.
_SOONER_REMOVED = timedelta(seconds=12)


def _lower_default(function: Callable[..., Any], name: str, value: object) -> None:
    parameters = [p for p in inspect.signature(function).parameters.values() if p.default is not p.empty]
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    defaults = list(function.__defaults__ or ())
    defaults[positional.index(name)] = value
    function.__defaults__ = tuple(defaults)


def _shorten_pipeline(name: str, interval: timedelta) -> None:
    base: Any = importlib.import_module(f"{_BACKGROUND}.pipeline_tasks.base")
    module: Any = importlib.import_module(f"{_BACKGROUND}.pipeline_tasks.{name}")
    own = [value for value in vars(module).values() if inspect.isclass(value)]
    (pipeline,) = (cls for cls in own if issubclass(cls, base.Pipeline) and cls is not base.Pipeline)
    (fetcher,) = (cls for cls in own if issubclass(cls, base.Fetcher) and cls is not base.Fetcher)
    _lower_default(pipeline.__init__, "min_processing_interval", interval)
    if hasattr(module, "JOB_TERMINATION_DEADLINE"):
        module.JOB_TERMINATION_DEADLINE = _TERMINATION_DEADLINE
    if hasattr(fetcher, "_DEFAULT_FETCH_DELAYS"):
        fetcher._DEFAULT_FETCH_DELAYS = _FETCH_DELAYS
    else:
        _lower_default(fetcher.__init__, "fetch_delays", _FETCH_DELAYS)


def _shorten_task(name: str, interval: timedelta) -> None:
    module: Any = importlib.import_module(f"{_BACKGROUND}.tasks.{name}")
    if hasattr(module, "MIN_PROCESSING_INTERVAL"):
        module.MIN_PROCESSING_INTERVAL = interval


def _shorten_graces() -> None:
    runs: Any = importlib.import_module("dstack._internal.server.services.runs")
    delay = runs.delay_job_instance_termination

    def delay_less(job_model: Any) -> None:
        delay(job_model)
        job_model.remove_at -= _SOONER_REMOVED

    runs.delay_job_instance_termination = delay_less


def _shorten_schedule(background: Any) -> None:
    """Give the tasks shorter intervals at the moment the server schedules them."""
    add_job = background._scheduler.add_job

    def add_faster(task: Any, trigger: Any, *arguments: Any, **options: Any) -> Any:
        interval = _TASK_INTERVALS.get(task.__name__)
        if interval is not None:
            seconds = interval.total_seconds()
            trigger = background.IntervalTrigger(seconds=seconds, jitter=_TASK_JITTER)
        return add_job(task, trigger, *arguments, **options)

    background._scheduler.add_job = add_faster


def shorten_pauses() -> list[str]:
    """Shorten the pauses that exist, and return the names that were not found."""
    failures = []
    background: Any = importlib.import_module(_BACKGROUND)
    scheduled = hasattr(background, "_scheduler") and not importlib.util.find_spec(
        f"{_BACKGROUND}.pipeline_tasks"
    )
    shorten, intervals = (_shorten_task, _TASK_INTERVALS) if scheduled else (_shorten_pipeline, _INTERVALS)
    for name, interval in intervals.items():
        try:
            shorten(name, interval)
        except (ImportError, AttributeError, ValueError, IndexError) as error:
            failures.append(f"{name}: {error!r}")
    if scheduled:
        _shorten_schedule(background)
        _shorten_graces()
    return failures


def give_up_soon() -> list[str]:
    """Shorten how long the server tries to reach a job, and return the names that were not found."""
    pipelines = importlib.util.find_spec(f"{_BACKGROUND}.pipeline_tasks")
    name = "pipeline_tasks.jobs_running" if pipelines else "tasks.process_running_jobs"
    running: Any = importlib.import_module(f"{_BACKGROUND}.{name}")
    patience = {
        "JOB_DISCONNECTED_RETRY_TIMEOUT": _UNREACHABLE,
        "get_provisioning_timeout": lambda *_, **__: _STARTING,
    }
    found = {name: value for name, value in patience.items() if hasattr(running, name)}
    vars(running).update(found)
    return [name for name in patience if name not in found]


def take_images_for_plain() -> list[str]:
    """Let every image exist, without an entrypoint and with the user root; return the names not found."""
    docker = importlib.import_module("dstack._internal.server.services.docker")
    configurators: Any = importlib.import_module("dstack._internal.server.services.jobs.configurators.base")
    fields = {"architecture": "amd64", "os": "linux", "config": {"User": "root"}}
    plain = docker.ImageConfigObject(
        **{key: value for key, value in fields.items() if key in _fields(docker.ImageConfigObject)}
    )
    if hasattr(configurators, "get_image_config_and_cpu_architectures"):
        architectures = {docker.gpuhunt.CPUArchitecture.X86}
        configurators.get_image_config_and_cpu_architectures = lambda *_: (plain, architectures)
    elif hasattr(configurators, "get_image_config"):
        configurators.get_image_config = lambda *_: plain
    else:
        return ["no function that asks the registry was found"]
    return []


def _fields(model: Any) -> Any:
    return getattr(model, "model_fields", None) or model.__fields__


def main() -> None:
    """Apply the changes that the environment variables select, then run the command line."""
    with contextlib.suppress(ImportError, AttributeError):
        # The server's own entry point does this before it imports anything else.
        importlib.import_module("dstack._internal.server.bootstrap").set_up_process()
    if os.environ.pop("RIG_FAST", None):
        for failure in shorten_pauses():
            sys.stderr.write(f"fast_start: keeps the stock pauses of {failure}\n")
    if os.environ.pop("RIG_IMPATIENT", None):
        for failure in give_up_soon():
            sys.stderr.write(f"fast_start: keeps the stock patience of {failure}\n")
    if os.environ.pop("RIG_IMAGES", None):
        for failure in take_images_for_plain():
            sys.stderr.write(f"fast_start: images are looked up: {failure}\n")
    importlib.import_module("dstack._internal.cli.main").main()


if __name__ == "__main__":
    main()
