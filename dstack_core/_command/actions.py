"""What each command does: one request or flow of the client, and its result as text or JSON."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from typing import Any

from dstack_core._command.log_text import without_messages
from dstack_core.client import Client
from dstack_core.errors import RunNotFoundError
from dstack_core.integration.command_line import (
    COMMAND_RETRY_SECONDS,
    TextStyle,
    command_limits,
    text_table,
)
from dstack_core.integration.doctor import examine
from dstack_core.integration.outcome_text import describe_stop
from dstack_core.integration.run_lists import rows_json, show_costs, show_findings, show_runs
from dstack_core.models.configurations import Task
from dstack_core.models.money import format_price
from dstack_core.models.stops import StopState
from dstack_core.run import Run

# Seconds: a person waits for the answer of ``doctor``.
_DOCTOR_TIMEOUT = 10.0
# Seconds: a log that is followed outlives longer pauses of the server than a person waits for an answer.
_FOLLOWER_RETRY_SECONDS = 30.0


def ps(options: Namespace) -> int:
    """List runs."""
    with _client(options) as client:
        _print(show_runs(client, all=options.all, as_json=options.output == "json", style=_style()))
    return 0


def logs(options: Namespace) -> int:
    """Print a log, byte for byte, without the messages in it unless ``--raw``."""
    with _client(options) as client:
        chunks = _run(client, options.name).logs(
            follow=options.follow, node=options.node, diagnose=options.diagnose
        )
        for chunk in chunks if options.raw else without_messages(chunks):
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
    return 0


def stop(options: Namespace) -> int:
    """Stop runs and report each; 1 if one does not exist."""
    status = 0
    with _client(options) as client:
        for name in options.names:
            result = client.runs.stop(name, options.abort, until="ended", timeout=options.timeout)
            if result.state is StopState.MISSING:
                status = 1
                _print(f"Project {client.project} on {client.server_url} has no run {name} to stop.")
            else:
                _print(describe_stop(result))
    return status


def attach(options: Namespace) -> int:
    """Open a shell, or run a command; return its exit status."""
    # Only this command needs SSH.
    from dstack_core._attach.terminal import run_shell

    command = shlex.join(options.command) or None
    with _client(options) as client, _run(client, options.name) as run:
        run.attach(options.identity, node=options.node)
        attachment = run._attachment
        if attachment is None:
            sys.stderr.write(f"Run {run.name} has ended; there is no container to enter.\n")
            return 1
        if command is None and sys.stdin.isatty():
            ports = ", ".join(f"127.0.0.1:{local} -> {port}" for port, local in run.ports.items())
            forwarded = f" Forwarded: {ports}." if ports else ""
            sys.stderr.write(f"In the container of run {run.name}; leave it with exit.{forwarded}\n")
        return run_shell(attachment.session(), command)


def offers(options: Namespace) -> int:
    """List machines."""
    wanted = {key: getattr(options, key) for key in ("gpu", "cpu", "memory") if getattr(options, key)}
    given: dict[str, Any] = {
        "resources": wanted or None,
        "backends": options.backend,
        "max_price": options.max_price,
        "spot_policy": options.spot,
    }
    with _client(options) as client:
        plan = client.runs.plan(
            options.configuration or Task(commands=["true"]),
            **{key: value for key, value in given.items() if value is not None},
        )
    shown = plan.offers[: options.limit]
    if options.output == "json":
        _print(rows_json(shown))
    elif not shown:
        _print(" ".join(["No machine is on offer.", *plan.hints]))
    else:
        cells = [
            (
                each.backend,
                each.region,
                each.instance,
                "spot" if each.spot else "on-demand",
                format_price(each.price_per_hour),
                each.availability or "",
            )
            for each in shown
        ]
        head = ("BACKEND", "REGION", "INSTANCE", "KIND", "PRICE", "AVAILABILITY")
        _print(text_table(head, cells, _style(), states=(5,), whole=(0, 2, 4)))
        if plan.total_offers > len(shown):
            _print(f"{len(shown)} of {plan.total_offers} offers, the cheapest first.")
    return 0 if shown else 1


def cost(options: Namespace) -> int:
    """Show what runs have cost."""
    with _client(options) as client:
        text = show_costs(
            client,
            by=options.by,
            since=options.since,
            until=options.until,
            as_json=options.output == "json",
            as_csv=options.csv,
            style=_style(),
        )
        _print(text)
    return 0


def doctor(options: Namespace) -> int:
    """Show what each check found; 1 if something does not work."""
    findings = examine(lambda: _client(options, examined=True), run_name=options.run)
    return show_findings(findings, sys.stdout, as_json=options.output == "json")


def _client(options: Namespace, *, examined: bool = False) -> Client:
    if examined:
        return Client.from_config(
            project_name=options.project,
            timeout=_DOCTOR_TIMEOUT,
            connect_timeout=_DOCTOR_TIMEOUT,
            retry_budget=0,
        )
    limits = command_limits()
    if options.action in (logs, attach):
        limits["retry_budget"] = _FOLLOWER_RETRY_SECONDS
    return Client.from_config(project_name=options.project, **limits)


def _run(client: Client, name: str) -> Run:
    run = client.runs.get(name, retry_budget=COMMAND_RETRY_SECONDS)
    if run is None:
        raise RunNotFoundError(
            f"Project {client.project} on {client.server_url} has no run {name}. "
            "List the runs: python -m dstack_core ps --all"
        )
    return run


def _style() -> TextStyle:
    return TextStyle.of(sys.stdout)


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
