"""The command line: ``python -m prefect_dstack``, or ``prefect-dstack``."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

from cyclopts import App, Parameter

from prefect_dstack import __version__
from prefect_dstack.reaper import describe, summary
from prefect_dstack.reaper import reap as find_and_stop

app = App(
    name="prefect-dstack",
    help="Look after the dstack runs of Prefect flow runs.",
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
    """Stop the dstack runs and delete the fleets of flow runs that have ended; report how runs ended.

    It shows a line for each run and fleet, and their count. The exit status is 1 if a server does not answer,
    or if a run could not be stopped.
    """
    from httpx import HTTPError
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
    except HTTPError as error:
        from prefect_dstack._commands import without_prefect

        sys.stderr.write(f"{without_prefect(error)}\n")
        return 1
    for found in findings:
        sys.stdout.write(f"{describe(found, dry_run=dry_run)}\n")
    sys.stdout.write(f"{summary(findings, dry_run=dry_run)}\n")
    return 1 if any(found["failed"] for found in findings) else 0


_Credentials = Annotated[
    str | None, Parameter(help="Name of a saved DstackCredentials block; else the environment is used.")
]
_Output = Annotated[Literal["text", "json"], Parameter(name=["--output", "-o"], help="text or json.")]


@app.command
def ps(
    *,
    credentials: _Credentials = None,
    finished: Annotated[
        bool, Parameter(name=["--all", "-a"], negative="", help="Finished runs too.")
    ] = False,
    every: Annotated[
        bool, Parameter(negative="", help="Also runs that are not of Prefect flow runs.")
    ] = False,
    output: _Output = "text",
) -> int:
    """List the dstack runs of Prefect flow runs."""
    from prefect_dstack import _commands

    return _commands.show(
        lambda: _commands.ps(credentials, finished=finished, every=every, as_json=output == "json")
    )


@app.command
def cost(
    *,
    credentials: _Credentials = None,
    by: Annotated[
        str | None,
        Parameter(
            help="owner, dag, flow, task, user, gpu, day, name, status or tag:KEY; several with commas. By "
            "default owner, with --flow task."
        ),
    ] = None,
    flow: Annotated[str | None, Parameter(help="Only runs of this flow's flow runs.")] = None,
    since: Annotated[
        str | None, Parameter(help="Only runs submitted within this, such as 7d, or since a date.")
    ] = None,
    until: Annotated[str | None, Parameter(help="Only runs submitted before this, likewise.")] = None,
    csv: Annotated[bool, Parameter(negative="", help="Print CSV.")] = False,
    output: _Output = "text",
) -> int:
    """Show what dstack runs have cost."""
    from prefect_dstack import _commands

    return _commands.show(
        lambda: _commands.cost(
            credentials,
            by=by or ("task" if flow else "owner"),
            flow=flow,
            since=since,
            until=until,
            as_json=output == "json",
            as_csv=csv,
        )
    )


@app.command
def doctor(
    *,
    credentials: _Credentials = None,
    run: Annotated[str | None, Parameter(help="A running run whose container is logged in to.")] = None,
    output: _Output = "text",
) -> int:
    """Check the block, the way from this machine to a run, and Prefect; name what to do.

    The exit status is 1 if something does not work.
    """
    from prefect_dstack import _commands

    return _commands.doctor(credentials, run=run, as_json=output == "json")


if __name__ == "__main__":
    app()
