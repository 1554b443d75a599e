"""The examination of a connection to dstack: what works, what does not, and what to do about it.

The problem: between a machine and its first run are a configuration, a network, TLS, a token, a project,
machines and SSH. A failed submit shows only the first that is wrong, as the error of a run.

The idea: checks in the order in which a request meets them, each with one finding. A check that fails ends
the ones that need it. Nothing is submitted, changed or kept.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dstack_core import _drive
from dstack_core._attach.extra import INSTALL, missing_packages
from dstack_core._attach.keys import default_key_path, read_identity_file
from dstack_core._flow.steps import Op, call
from dstack_core._wire.versions import NEWEST, OLDEST, parse_release, release_text, support_of
from dstack_core.config import find_config_file
from dstack_core.errors import (
    AccessDeniedError,
    AttachError,
    AuthenticationError,
    ConfigurationError,
    DstackError,
    PortInUseError,
    ProjectNotFoundError,
    ProtocolError,
    ServerError,
    WaitTimeoutError,
)
from dstack_core.integration.doctor_network import Finding, certificate, error, unreachable, warning
from dstack_core.models.configurations import Task
from dstack_core.models.money import format_price

if TYPE_CHECKING:
    from dstack_core.client import Client

# Seconds. Log times, ages in lists and the reaper's minimum age compare the clocks of two machines.
_CLOCK_DIFFERENCE = 30.0
# Seconds for a reply to a request that asks no cloud. Slower servers work, but each poll is slow.
_SLOW_REPLY = 2.0
# Seconds: a running container answers SSH at once, or after the tries of a first connection.
_ATTACH_SECONDS = 30.0
_TO_ATTACH = f"To log in to containers, run: {INSTALL}"


def examine(connect: Callable[[], Client], *, run_name: str | None = None) -> Iterator[Finding]:
    """Check the way from this machine to a run, and yield a finding for each check as it is made.

    Args:
        connect: Returns the client to examine; make it with ``retry_budget=0``, so that a server that does
            not answer is reported at once. What it raises as ``ConfigurationError`` is a finding.
        run_name: A run that is running, whose container is logged in to over SSH. Default: the newest one,
            if there is one.

    Yields:
        The findings, in the order of the checks. Raises nothing that a server or network causes.

    Example::

        for found in examine(lambda: Client.from_config(retry_budget=0, timeout=10)):
            print(found.state, found.check, found.text, found.advice)
    """
    yield from _installation()
    try:
        client = connect()
    except ConfigurationError as problem:
        yield error("configuration", problem.message, "Correct it, then run this again.")
        return
    with client:
        yield Finding("configuration", "ok", f"Server {client.server_url}, project {client.project}.")
        yield from _config_file()
        yield from _of_server(client, run_name)


def _installation() -> Iterator[Finding]:
    if find_spec("httpx") is None:
        yield warning(
            "installation",
            "The async client cannot be used: httpx is missing.",
            "Install dstack-core[async].",
        )
    else:
        yield Finding("installation", "ok", "The sync and the async client can be used.")
    if missing_packages():
        yield Finding(
            "installation", "skipped", f"The extra attach is missing; only attaching needs it. {_TO_ATTACH}"
        )


def _config_file() -> Iterator[Finding]:
    path = find_config_file(Path.home())
    if path is not None:
        yield from _open_to_others("config file", path, f"the tokens in {path}")


def _open_to_others(check: str, path: Path, what: str) -> Iterator[Finding]:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        yield warning(
            check,
            f"Other users of this machine can read {what} (mode {mode:03o}).",
            f"Run: chmod 600 {path}",
        )


def _now() -> float:
    return time.monotonic()


def _of_server(client: Client, run_name: str | None) -> Iterator[Finding]:
    before = _now()
    try:
        release, skew = _drive.run(_ask_server(client), client._transport)
    except ServerError as problem:
        yield unreachable(client.server_url, problem)
        return
    seconds = _now() - before
    yield from certificate(client.server_url)
    yield from _reply_time(client.server_url, seconds)
    yield from _version(release)
    yield from _clocks(skew)
    if (yield from _token(client)) and (yield from _project(client)):
        yield from _machines(client)
        yield from _ssh(client, run_name)


def _ask_server(client: Client) -> Op[tuple[str | None, float | None]]:
    """Return the server's version and how far its clock is ahead, in seconds."""
    info = yield from call(client._operations.api.get_info())
    try:
        ahead = (parsedate_to_datetime(info.date or "") - datetime.now(UTC)).total_seconds()
    except ValueError:
        # Without the header, or with one that no server of HTTP sends, the clocks are not compared.
        return info.version, None
    return info.version, ahead


def _reply_time(url: str, seconds: float) -> Iterator[Finding]:
    if seconds > _SLOW_REPLY:
        yield warning(
            "server",
            f"{url} took {seconds:.1f} s to answer.",
            "Runs work, but each poll is slow: check the server's load, its database and the network.",
        )
    else:
        yield Finding("server", "ok", f"{url} answers within {seconds:.2f} s.")


def _version(text: str | None) -> Iterator[Finding]:
    oldest, newest = release_text(OLDEST), release_text(NEWEST)
    match support_of(parse_release(text)):
        case "unknown":
            yield warning(
                "version",
                "The server does not report its version.",
                f"Versions {oldest} to {newest} are tested; use a release of dstack.",
            )
        case "too old":
            yield error(
                "version",
                f"The server is dstack {text}.",
                f"Update it: {oldest} is the oldest that is supported.",
            )
        case "newer":
            yield warning(
                "version",
                f"The server is dstack {text}.",
                f"Versions up to {newest} are tested; look for a newer dstack-core.",
            )
        case "tested":
            yield Finding("version", "ok", f"The server is dstack {text}.")


def _clocks(ahead: float | None) -> Iterator[Finding]:
    if ahead is None:
        return
    if abs(ahead) > _CLOCK_DIFFERENCE:
        way = "ahead of" if ahead > 0 else "behind"
        yield warning(
            "clocks",
            f"The server's clock is {abs(ahead):.0f} s {way} this machine's.",
            "Synchronise both with NTP: log times and ages are wrong otherwise.",
        )
    else:
        yield Finding("clocks", "ok", "The clocks of the server and this machine agree.")


def _token(client: Client) -> Generator[Finding, None, bool]:
    try:
        user = client.user()
    except AuthenticationError as problem:
        yield error(
            "token",
            problem.message,
            "Copy the token again from the user's page in the dstack UI; it changes when it is refreshed.",
        )
        return False
    except ProtocolError as problem:
        # Old servers have no version to ask for, so only this request shows that another program answers.
        yield unreachable(client.server_url, problem)
        return False
    except ServerError as problem:
        yield error("token", problem.message, "Check the server's own log.")
        return False
    yield Finding("token", "ok", f"The token is that of user {user.name} ({user.global_role}).")
    return True


def _project(client: Client) -> Generator[Finding, None, bool]:
    name = client.project
    try:
        project = client.projects.get()
        # Reading a project may be allowed to everybody, its runs are not.
        client.runs.list()
    except ProjectNotFoundError:
        try:
            known = ", ".join(each.name for each in client.projects.list()) or "none"
        except ServerError:
            known = "unknown"
        yield error(
            "project", f"The server has no project {name}.", f"The projects of this token: {known}. Use one."
        )
        return False
    except AccessDeniedError:
        yield error(
            "project",
            f"The token's user is not a member of project {name}.",
            f"Ask its owner to add the user, or use another project than {name}.",
        )
        return False
    except ServerError as problem:
        yield error("project", problem.message, "Check the server's own log.")
        return False
    backends = ", ".join(each.name for each in project.backends) or "none"
    yield Finding("project", "ok", f"Project {name} can be used; its backends: {backends}.")
    return True


def _machines(client: Client) -> Iterator[Finding]:
    try:
        plan = client.runs.plan(Task(commands=["true"]))
    except DstackError as problem:
        yield error("machines", problem.message, "Runs of this project are refused for the same reason.")
        return
    if plan.total_offers:
        cheapest = (
            f"; the cheapest costs {format_price(plan.offers[0].price_per_hour)}" if plan.offers else ""
        )
        yield Finding("machines", "ok", f"{_number(plan.total_offers, 'machine')} on offer{cheapest}.")
        return
    hints = " ".join(plan.hints)
    yield error(
        "machines",
        "No machine is on offer for a task without requirements.",
        hints or "Add a backend to the project, or a fleet (dstack apply -f fleet.dstack.yml).",
    )


def _number(count: int, noun: str) -> str:
    return f"1 {noun} is" if count == 1 else f"{count} {noun}s are"


def _ssh_key() -> Iterator[Finding]:
    path = default_key_path()
    if not path.is_file():
        return
    yield from _open_to_others("SSH key", path, str(path))
    if missing_packages():
        return
    try:
        read_identity_file(path)
    except ConfigurationError as problem:
        yield error(
            "SSH key",
            problem.message,
            f"Move {path} away: runs then use the key on the server, or a new one.",
        )


def _ssh(client: Client, run_name: str | None) -> Iterator[Finding]:
    yield from _ssh_key()
    if missing_packages():
        yield Finding("SSH", "skipped", f"No container was logged in to. {_TO_ATTACH}")
        return
    try:
        if run_name is not None:
            run = client.runs.get(run_name)
            if run is None:
                yield error("SSH", f"Project {client.project} has no run {run_name}.", "Name a run of it.")
                return
        else:
            statuses = [(each, each.last_status) for each in client.runs.list()]
            has_container = (
                each for each, status in statuses if not (status.is_before_start or status.is_ending)
            )
            run = next(has_container, None)
        if run is None or not run.last_status.is_active:
            yield Finding("SSH", "skipped", "No run is running, so no container was logged in to.")
            return
        with run.attach(timeout=_ATTACH_SECONDS):
            yield Finding("SSH", "ok", f"The container of run {run.name} can be logged in to.")
    except PortInUseError as problem:
        yield warning("SSH", problem.message, "Stop what has the port, or give the run another one.")
    except (AttachError, WaitTimeoutError) as problem:
        # The newest run may be another user's, whose key this machine does not have.
        yield (warning if run_name is None else error)(
            "SSH",
            problem.message,
            "Attaching and live logs need it; runs and their logs work without.",
        )
    except DstackError as problem:
        yield error("SSH", problem.message, "Check the server's own log.")
