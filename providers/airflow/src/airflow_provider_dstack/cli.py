"""The commands that this provider adds to Airflow's command line: ``airflow dstack``.

Airflow imports this module for each of its commands, so what only one of them needs is imported there.
"""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from airflow.cli.cli_config import (
    ARG_VERBOSE,
    ActionCommand,
    Arg,
    CLICommand,
    GroupCommand,
)
from airflow.utils.cli import action_cli, suppress_logs_and_warning

if TYPE_CHECKING:
    from airflow_provider_dstack._reap import Finding
    from airflow_provider_dstack._reap_fleets import FleetFinding
    from airflow_provider_dstack._reap_secrets import SecretFinding

_log = logging.getLogger(__name__)

_REAP = """\
List the active dstack runs of Airflow tasks, and stop those whose task has ended. Left alone are runs of
tasks that have not ended, of other Airflows, with on_kill_action="keep", and services whose task succeeded.
Fleets and project secrets of Airflow tasks are deleted once their DAG run has ended.
Reads Airflow's database: run it where the scheduler or the API server runs. Try --dry-run first."""
_DOCTOR = """\
Check each step from this machine to a container of dstack (connection, network, TLS, version, clocks, token,
project, machines, SSH), and the health of Airflow. Nothing is submitted or changed."""
# As in the core, which Airflow's other commands do not import.
_COST_KEYS = """\
owner, dag, flow, task, user, gpu, day, name, status or tag:KEY; several with commas (default: owner; with
--dag: task)"""
_EXIT = "Exit code: 0, or 1 when a server does not answer or a run could not be stopped."


def get_cli_commands() -> list[CLICommand]:
    """Return the commands. Source: Airflow documentation, "CLI Commands" of providers."""
    connection = _option(
        "--conn-id", help="Connection of the dstack server (default: %(default)s)", default="dstack_default"
    )
    project = _option("--project", help="dstack project (default: the connection's)")
    output = _option(
        "-o", "--output", help="text or json (default: text)", choices=("text", "json"), default="text"
    )
    ps_command = ActionCommand(
        name="ps",
        help="List the dstack runs of Airflow tasks",
        func=ps,
        args=(
            _option("-a", "--all", help="Finished runs too", action="store_true"),
            _option("--every", help="Also runs that are not of Airflow tasks", action="store_true"),
            connection,
            project,
            output,
            ARG_VERBOSE,
        ),
    )
    cost_command = ActionCommand(
        name="cost",
        help="Show what dstack runs have cost",
        func=cost,
        args=(
            _option("--by", help=_COST_KEYS),
            _option("--dag", help="Only runs of this DAG's tasks"),
            _option("--since", help="Only runs submitted within this duration, such as 7d, or since a date"),
            _option("--until", help="Only runs submitted before this, likewise"),
            _option("--csv", help="Print CSV", action="store_true"),
            connection,
            project,
            output,
            ARG_VERBOSE,
        ),
    )
    doctor_command = ActionCommand(
        name="doctor",
        help="Check the connection, the way to a run, and Airflow; name what to do",
        description=_DOCTOR,
        epilog="Exit code: 0, or 1 when something does not work.",
        func=doctor,
        args=(
            _option("--run", help="A running run whose container is logged in to"),
            connection,
            project,
            output,
            ARG_VERBOSE,
        ),
    )
    command = ActionCommand(
        name="reap",
        help="Stop the dstack runs whose task has ended",
        description=_REAP,
        epilog=_EXIT,
        func=reap,
        args=(
            _option("-n", "--dry-run", help="Show what would be stopped, stop nothing", action="store_true"),
            _option(
                "--min-age",
                help="How long a task must have ended before its run is stopped (default: %(default)g)",
                metavar="SECONDS",
                type=float,
                default=60.0,
            ),
            _option(
                "--stop-unknown",
                help="Also stop runs that are not known to be this Airflow's; they may be another's",
                action="store_true",
            ),
            _option(
                "--stop-services",
                help="Also stop services whose task succeeded, once their DAG run has ended",
                action="store_true",
            ),
            connection,
            project,
            _option(
                "-o",
                "--output",
                help="Output format: text (a line for each run), json, yaml, plain or table (default: text)",
                metavar="FORMAT",
                choices=("text", "json", "yaml", "plain", "table"),
                default="text",
            ),
            ARG_VERBOSE,
        ),
    )
    return [
        GroupCommand(
            name="dstack",
            help="Manage the dstack runs of Airflow tasks",
            subcommands=(ps_command, cost_command, command, doctor_command),
        )
    ]


@action_cli(check_db=False)  # type: ignore[no-untyped-call, untyped-decorator]  # Airflow's is untyped
@suppress_logs_and_warning
def ps(args: Namespace) -> None:
    """Do ``airflow dstack ps``."""
    from airflow_provider_dstack import _commands

    _show(_commands.ps, args)


@action_cli(check_db=False)  # type: ignore[no-untyped-call, untyped-decorator]  # Airflow's is untyped
@suppress_logs_and_warning
def cost(args: Namespace) -> None:
    """Do ``airflow dstack cost``."""
    from airflow_provider_dstack import _commands

    _show(_commands.cost, args)


@action_cli(check_db=False)  # type: ignore[no-untyped-call, untyped-decorator]  # Airflow's is untyped
@suppress_logs_and_warning
def doctor(args: Namespace) -> None:
    """Do ``airflow dstack doctor``; ends the program with exit code 1 when something does not work."""
    from airflow_provider_dstack import _commands
    from dstack_core.integration import show_findings

    if show_findings(_commands.doctor(args), sys.stdout, as_json=args.output == "json", indent=None):
        raise SystemExit(1)


def _show(command: Callable[[Namespace], str], args: Namespace) -> None:
    from airflow_provider_dstack._commands import in_words
    from airflow_provider_dstack._compat import AirflowException
    from dstack_core import DstackError as CoreError

    try:
        sys.stdout.write(f"{command(args)}\n")
    except (CoreError, AirflowException) as error:
        raise SystemExit(in_words(error)) from None


@action_cli(check_db=False)  # type: ignore[no-untyped-call, untyped-decorator]  # Airflow's is untyped
@suppress_logs_and_warning
def reap(args: Namespace) -> None:
    """Do ``airflow dstack reap``: what ``DstackReapOperator`` does, with Airflow's database.

    Ends the program with exit code 1 and a message when something went wrong.
    """
    from sqlalchemy.exc import SQLAlchemyError

    from airflow_provider_dstack._commands import ServerHook
    from airflow_provider_dstack._compat import AirflowException, database_tasks
    from airflow_provider_dstack._reap import ReapOptions, failure
    from airflow_provider_dstack._reap import reap as find_and_stop
    from airflow_provider_dstack._reap_secrets import reap_resources, resource_failures
    from dstack_core import DstackError as CoreError

    if not args.min_age >= 0:
        raise SystemExit(f"--min-age: expected 0 seconds or more, got {args.min_age:g}.")
    options = ReapOptions(args.dry_run, args.min_age, args.stop_unknown, args.stop_services)
    try:
        with database_tasks() as ask, ServerHook(args.conn_id, args.project).client() as client:
            findings = find_and_stop(client, ask, options, log=_log)
            resources = reap_resources(
                client, ask, dry_run=args.dry_run, stop_unknown=args.stop_unknown, log=_log
            )
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
    _print(findings, resources, project, args.output)
    problems = [failure(findings) or "", *resource_failures(resources)]
    if any(problems):
        raise SystemExit(" ".join(filter(None, problems)))


def _print(
    findings: Sequence[Finding],
    resources: Sequence[FleetFinding | SecretFinding],
    project: str,
    output: str,
) -> None:
    from airflow.cli.simple_table import AirflowConsole

    from airflow_provider_dstack._reap import describe, summary
    from airflow_provider_dstack._reap_secrets import describe_resource

    if output == "text":
        # A console would wrap the lines, so that no page could be copied.
        lines = [*map(describe, findings), *map(describe_resource, resources), summary(findings, project)]
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    else:
        AirflowConsole().print_as(data=[*map(asdict, findings), *map(asdict, resources)], output=output)


def _option(*flags: str, **kwargs: Any) -> Arg:
    return Arg(flags, **kwargs)  # type: ignore[no-untyped-call]  # Airflow's is untyped
