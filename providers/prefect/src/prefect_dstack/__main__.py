"""The command line: ``python -m prefect_dstack reap``, or ``prefect-dstack reap``."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from prefect_dstack import __version__
from prefect_dstack.reaper import reap as find_and_stop

app = App(
    name="prefect-dstack",
    help="Stop and report the dstack runs of Prefect flow runs that have ended.",
    version=__version__,
)


@app.command
def reap(
    *,
    credentials: Annotated[
        str | None, Parameter(help="Name of a saved DstackCredentials block; else the environment is used.")
    ] = None,
    dry_run: Annotated[bool, Parameter(help="Only show what would be stopped.")] = False,
    min_age: Annotated[
        float, Parameter(help="Seconds between the end of a flow run and the stop of its runs.")
    ] = 60.0,
    stop_unknown: Annotated[
        bool, Parameter(help="Also stop the runs of flow runs that this Prefect server does not know.")
    ] = False,
) -> int:
    """Stop the active dstack runs whose flow run has ended, and report how runs ended.

    Returns 0, or 1 with one line on the standard error when a server does not answer.
    """
    from dstack_core import DstackError

    try:
        findings = find_and_stop(credentials, dry_run=dry_run, min_age=min_age, stop_unknown=stop_unknown)
    except DstackError as error:
        Console(stderr=True).print(error.message, markup=False)
        return 1
    table = Table("run", "owner", "state", "stopped", "reason")
    for found in findings:
        stopped = "no" if not found["stopped"] else "would be" if dry_run else "yes"
        table.add_row(found["run_name"], found["owner"], found["state"], stopped, found["reason"])
    Console().print(table if findings else "No active or unreported run of a flow run was found.")
    return 0


if __name__ == "__main__":
    app()
