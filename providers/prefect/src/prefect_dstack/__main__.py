"""The command line: ``python -m prefect_dstack reap``, or ``prefect-dstack reap``."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import App, Parameter

from prefect_dstack import __version__
from prefect_dstack.reaper import describe, summary
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
        float, Parameter(help="Seconds that a flow run must have ended before its runs are stopped.")
    ] = 60.0,
    stop_unknown: Annotated[
        bool, Parameter(help="Also stop the runs of flow runs that this Prefect server does not know.")
    ] = False,
) -> int:
    """Stop the active dstack runs whose flow run has ended, and report how runs ended.

    Prints a line for each run, and their count. Returns 0, or 1 with one line on the standard error when a
    server does not answer, and when a run could not be stopped.
    """
    from prefect.settings import PREFECT_API_URL

    from dstack_core import DstackError

    if not PREFECT_API_URL.value():
        # Without it Prefect starts a server of its own, which knows no flow run.
        sys.stderr.write("PREFECT_API_URL: expected the address of your Prefect server, got none.\n")
        return 1
    try:
        findings = find_and_stop(credentials, dry_run=dry_run, min_age=min_age, stop_unknown=stop_unknown)
    except DstackError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    for found in findings:
        sys.stdout.write(f"{describe(found, dry_run=dry_run)}\n")
    sys.stdout.write(f"{summary(findings, dry_run=dry_run)}\n")
    return 1 if any(found["failed"] for found in findings) else 0


if __name__ == "__main__":
    app()
