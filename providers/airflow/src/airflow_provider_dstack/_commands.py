"""What ``airflow dstack ps``, ``cost`` and ``doctor`` do; imported by the one that runs.

The rows, tables and checks of dstack are the core's; here are the connection and Airflow's own health.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import requests

from airflow_provider_dstack._compat import AirflowException, api_address, server_connection
from airflow_provider_dstack.hooks import DstackHook
from dstack_core import Client, ConfigurationError, DstackError
from dstack_core.integration import (
    Finding,
    TextStyle,
    command_limits,
    cost_rows,
    examine,
    show_costs,
    show_runs,
)

# Seconds: a person waits for the answers of ``doctor``.
_DOCTOR_TIMEOUT = 10.0


class ServerHook(DstackHook):
    """A hook whose connection comes from Airflow's database, which workers do not have."""

    @classmethod
    def get_connection(cls, conn_id: str) -> Any:
        """Return the connection."""
        return server_connection(conn_id)

    def command_client(self) -> Client:
        """Return a client for a command that a person waits for: it reports a dead server soon.

        The connection's ``timeout`` wins. Raises ``AirflowFailException`` as ``client`` does.
        """
        try:
            return Client(**command_limits(self.client_arguments()))
        except ConfigurationError as error:
            raise self._unusable(error.message) from None


def ps(args: Namespace) -> str:
    """Return the active runs, those of Airflow tasks unless ``args.every``."""
    owner, owners = ("", "") if args.every else ("airflow:", " of Airflow tasks")
    with _client(args) as client:
        return show_runs(
            client,
            all=args.all,
            owner=owner,
            owners=owners,
            as_json=args.output == "json",
            indent=None,
            style=TextStyle.of(sys.stdout),
        )


def cost(args: Namespace) -> str:
    """Return what runs have cost."""
    try:
        # An error names the option, and comes before the connection is read.
        cost_rows([], by=args.by, since=args.since)
    except ConfigurationError as error:
        raise SystemExit(f"--{error.message}") from None
    with _client(args) as client:
        return show_costs(
            client,
            by=args.by,
            since=args.since,
            as_json=args.output == "json",
            indent=None,
            style=TextStyle.of(sys.stdout),
        )


def doctor(args: Namespace) -> Iterator[Finding]:
    """Check the connection, the way from here to a run, and Airflow."""

    def connect() -> Client:
        try:
            connection = server_connection(args.conn_id)
        except AirflowException as error:
            raise ConfigurationError(f"conn_id: {error}") from None
        if connection.conn_type != "dstack":
            raise ConfigurationError(
                f"conn_id: expected a connection of type dstack, got {args.conn_id} of type "
                f"{connection.conn_type}."
            )
        try:
            return ServerHook(args.conn_id, args.project).client(
                timeout=_DOCTOR_TIMEOUT, connect_timeout=_DOCTOR_TIMEOUT, retry_budget=0
            )
        except AirflowException as error:
            raise ConfigurationError(str(error)) from None

    yield from examine(connect, run_name=args.run)
    yield from _airflow()


def _airflow() -> Iterator[Finding]:
    """Check Airflow by its documented health page. Source: Airflow documentation, "Checking health"."""
    address = api_address()
    url = f"{address}/api/v2/monitor/health"
    try:
        reply = requests.get(url, timeout=_DOCTOR_TIMEOUT)
        reply.raise_for_status()
        health = reply.json()
    except (requests.RequestException, ValueError) as error:
        yield Finding(
            "Airflow",
            "warning",
            f"The API server does not answer at {address} ({type(error).__name__}).",
            "Set [api] base_url to its address, and make sure that workers and triggerers reach it: without "
            "it tasks cannot report.",
        )
        return
    for part, why in (
        ("scheduler", "No task starts."),
        ("triggerer", "Deferred tasks do not continue."),
        ("dag_processor", "New DAGs are not read."),
    ):
        status = (health.get(part) or {}).get("status")
        if status == "healthy":
            yield Finding(f"Airflow {part}", "ok", "It is healthy.")
        else:
            yield Finding(
                f"Airflow {part}",
                "warning",
                f"It is {'not running' if status is None else status}. {why}",
                f"Start it: airflow {part.replace('_', '-')}",
            )


def _client(args: Namespace) -> Client:
    return ServerHook(args.conn_id, args.project).command_client()


def in_words(error: DstackError | AirflowException) -> str:
    """Return the message of an error as the command shows it."""
    return error.message if isinstance(error, DstackError) else str(error)
