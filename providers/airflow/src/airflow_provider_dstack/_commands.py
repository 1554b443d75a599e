"""What ``airflow dstack ps``, ``cost`` and ``doctor`` do; imported by the one that runs.

The rows, tables and checks of dstack are the core's; here is the connection; ``_doctor`` checks Airflow.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

from airflow_provider_dstack._compat import AirflowException, server_connection
from airflow_provider_dstack._doctor import airflow_findings
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
# No run has this name.
_PROBE = "airflow-doctor-test"


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
    """Return what runs have cost, those of all owners unless ``args.dag``."""
    by = args.by or ("task" if args.dag else "owner")
    try:
        # An error names the option, and comes before the connection is read.
        cost_rows([], by=by, since=args.since, until=args.until)
    except ConfigurationError as error:
        raise SystemExit(f"--{error.message}") from None
    with _client(args) as client:
        return show_costs(
            client,
            by=by,
            since=args.since,
            until=args.until,
            marker_prefix=f"airflow:{args.dag}/" if args.dag else None,
            as_json=args.output == "json",
            as_csv=args.csv,
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
    yield from airflow_findings(_reply_seconds(connect))


def _reply_seconds(connect: Callable[[], Client]) -> float | None:
    """Return how long one reply of the dstack server takes, None if it does not answer."""
    try:
        with connect() as client:
            # The first request also opens the connection and asks for the version; a stop does not.
            client.runs.get(_PROBE)
            started = time.monotonic()
            client.runs.get(_PROBE)
            return time.monotonic() - started
    except DstackError:
        return None


def _client(args: Namespace) -> Client:
    return ServerHook(args.conn_id, args.project).command_client()


def in_words(error: DstackError | AirflowException) -> str:
    """Return the message of an error as the command shows it."""
    return error.message if isinstance(error, DstackError) else str(error)
