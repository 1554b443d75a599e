"""The commands that this provider adds to Airflow's command line: ``airflow dstack``."""

from __future__ import annotations

from typing import Any

from airflow.cli.cli_config import (
    ARG_VERBOSE,
    ActionCommand,
    Arg,
    CLICommand,
    GroupCommand,
    lazy_load_command,
)

_REAP = """\
List the active dstack runs of Airflow tasks, and stop those whose task has ended. Left alone are runs of
tasks that have not ended, of other Airflows, with on_kill_action="keep", and services whose task succeeded.
Reads Airflow's database: run it where the scheduler or the API server runs. Try --dry-run first."""
_EXIT = "Exit code: 0, or 1 when a server does not answer or a run could not be stopped."


def get_cli_commands() -> list[CLICommand]:
    """Return the commands. Source: Airflow documentation, "CLI Commands" of providers."""
    reap = ActionCommand(
        name="reap",
        help="Stop the dstack runs whose task has ended",
        description=_REAP,
        epilog=_EXIT,
        func=lazy_load_command("airflow_provider_dstack._reap_command.reap"),
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
            _option(
                "--conn-id",
                help="Connection of the dstack server (default: %(default)s)",
                default="dstack_default",
            ),
            _option("--project", help="dstack project (default: the connection's)"),
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
    return [GroupCommand(name="dstack", help="Manage the dstack runs of Airflow tasks", subcommands=(reap,))]


def _option(*flags: str, **kwargs: Any) -> Arg:
    return Arg(flags, **kwargs)  # type: ignore[no-untyped-call]  # Airflow's is untyped
