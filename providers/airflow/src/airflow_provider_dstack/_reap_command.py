"""Do ``airflow dstack reap``: the same as ``DstackReapOperator``, with Airflow's database."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from dataclasses import asdict
from typing import Any

from airflow.cli.simple_table import AirflowConsole
from airflow.utils.cli import action_cli, suppress_logs_and_warning

from airflow_provider_dstack._compat import AirflowException, database_tasks, server_connection
from airflow_provider_dstack._reap import Finding, ReapOptions, describe, failure, summary
from airflow_provider_dstack._reap import reap as find_and_stop
from airflow_provider_dstack.hooks import DstackHook

_log = logging.getLogger(__name__)


class _ServerHook(DstackHook):
    """A hook whose connection comes from Airflow's database, which workers do not have."""

    @classmethod
    def get_connection(cls, conn_id: str) -> Any:
        return server_connection(conn_id)


@action_cli(check_db=False)  # type: ignore[no-untyped-call, untyped-decorator]  # Airflow's is untyped
@suppress_logs_and_warning
def reap(args: Namespace) -> None:
    """Find, stop and print; ends the program with exit code 1 and a message when something went wrong."""
    from sqlalchemy.exc import SQLAlchemyError

    from dstack_core import DstackError as CoreError

    if not args.min_age >= 0:
        raise SystemExit(f"--min-age: expected 0 seconds or more, got {args.min_age:g}.")
    options = ReapOptions(args.dry_run, args.min_age, args.stop_unknown, args.stop_services)
    try:
        with database_tasks() as ask, _ServerHook(args.conn_id, args.project).client() as client:
            findings = find_and_stop(client, ask, options, log=_log)
            project = client.project
    except CoreError as error:
        raise SystemExit(error.message) from None
    except AirflowException as error:
        raise SystemExit(str(error)) from None
    except SQLAlchemyError as error:
        raise SystemExit(
            f"Airflow's database: expected an answer, got {error}. No run was stopped. Run this command "
            "where Airflow's scheduler or API server runs."
        ) from None
    _print(findings, project, args.output)
    problem = failure(findings)
    if problem is not None:
        raise SystemExit(problem)


def _print(findings: list[Finding], project: str, output: str) -> None:
    if output == "text":
        # A console would wrap the lines, so that no page could be copied.
        lines = [*map(describe, findings), summary(findings, project)]
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    else:
        AirflowConsole().print_as(data=[asdict(finding) for finding in findings], output=output)
