"""The arguments of ``python -m dstack_core`` and the choice of the command.

The token is never an argument, because arguments are seen in the list of processes: it comes from
``DSTACK_TOKEN`` or ``~/.dstack/config.yml``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dstack_core._command import actions
from dstack_core.errors import ConfigurationError, DstackError
from dstack_core.integration.run_lists import COST_KEYS, cost_rows

_EPILOG = """\
The server, the project and the token come from DSTACK_SERVER_URL, DSTACK_PROJECT and DSTACK_TOKEN, else from
~/.dstack/config.yml. Exit status: 0 (an empty list of ps and cost too), 1 for an error, a run that does not
exist, no offer, or a fault that doctor finds, 2 for wrong arguments; that of the shell for attach."""
# What a shell reports for a command that Ctrl-C ended.
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command and return the exit status; errors are one line on the standard error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _prepare_output()
    # What follows "--" is a command for the container, whose own options argparse must not read.
    own, _, command = _split(given)
    if own == ["--version"]:
        sys.stdout.write(f"dstack-core {_version()}\n")
        return 0
    options = _parser().parse_args(own)
    if command and options.action is not actions.attach:
        _parser().error(f"expected a command behind -- only for attach, got {' '.join(command)}")
    options.command = command
    action: Callable[[argparse.Namespace], int] = options.action
    try:
        return action(options)
    except DstackError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader, such as head, has enough. Without this Python reports the pipe once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # A full disk behind a redirection; the client's own errors are errors of dstack.
        sys.stderr.write(f"The output could not be written: {error.strerror or error}.\n")
        return 1


def _prepare_output() -> None:
    """Let no output fail for what receives it: closed, or with an encoding that lacks a character."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - until the process ends
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


def _split(given: list[str]) -> tuple[list[str], str, list[str]]:
    if "--" not in given:
        return given, "", []
    at = given.index("--")
    return given[:at], "--", given[at + 1 :]


def _whole(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more, got {text}")
        return int(text)

    return whole


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    # Every comparison with NaN is false.
    if not number > 0:
        raise argparse.ArgumentTypeError(f"expected a number greater than 0, got {text}")
    return number


def _group(text: str) -> str:
    return _checked(text, by=text)


def _since(text: str) -> str:
    return _checked(text, since=text)


def _until(text: str) -> str:
    return _checked(text, until=text)


def _checked(text: str, **options: Any) -> str:
    try:
        cost_rows([], **options)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(error.message.partition(": ")[2].rstrip(".")) from None
    return text


def _version() -> str:
    # Reading the metadata of distributions takes time that only this option is worth.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("dstack-core")
    except PackageNotFoundError:
        return "of a source folder that is not installed"


def _program() -> str:
    """Return the program's name as the user typed it."""
    return "dstack-core" if Path(sys.argv[0]).name == "dstack-core" else "python -m dstack_core"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_program(),
        description="Look after the runs of a dstack project.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, action: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=f"{help}.")
        command.set_defaults(action=action)
        command.add_argument("--project", help="the project instead of the configured one")
        return command

    ps = add("ps", actions.ps, "List the active runs")
    ps.add_argument("-a", "--all", action="store_true", help="finished ones too")
    _output(ps)

    logs = add("logs", actions.logs, "Print the log of a run")
    logs.add_argument("name", help="the run's name")
    logs.add_argument("-f", "--follow", action="store_true", help="until the run has ended")
    logs.add_argument("--node", type=_whole(0), help="one node of several, from 0")
    logs.add_argument("--diagnose", action="store_true", help="the log of the job's runner instead")

    logs.add_argument("--raw", action="store_true", help="with the messages that the run reports")

    stop = add("stop", actions.stop, "Stop runs")
    stop.add_argument("names", nargs="+", metavar="name", help="the names of the runs")
    stop.add_argument("--abort", action="store_true", help="kill the processes without a grace period")
    stop.add_argument(
        "--timeout", type=_above_zero, default=60.0, help="seconds to wait for the end (default: 60)"
    )

    attach = add(
        "attach",
        actions.attach,
        "Open a shell in the container of a run, or run a command there (-- COMMAND ...)",
    )
    attach.epilog = """\
What follows -- is one command with its arguments. For operators of a shell such as ; and | call one:
attach NAME -- sh -c 'cd /workflow; ls | wc -l'"""
    attach.formatter_class = argparse.RawDescriptionHelpFormatter
    attach.add_argument("name", help="the run's name")
    attach.add_argument("-i", "--identity", help="the private SSH key to log in with")
    attach.add_argument("--node", type=_whole(0), default=0, help="one node of several, from 0 (default: 0)")

    offers = add("offers", actions.offers, "List the machines on offer")
    offers.add_argument("configuration", nargs="?", help="a .dstack.yml whose resources count")
    offers.add_argument("--gpu", help="such as A100, 24GB.., H100:80GB:2")
    offers.add_argument("--cpu", help="such as 8..")
    offers.add_argument("--memory", help="such as 64GB..")
    offers.add_argument("--backend", action="append", help="only this one; may be repeated")
    offers.add_argument("--max-price", type=_above_zero, help="USD per hour")
    offers.add_argument("--spot", choices=("spot", "on-demand", "auto"), help="which machines")
    offers.add_argument("-n", "--limit", type=_whole(1), default=20, help="how many to show (default: 20)")
    _output(offers)

    cost = add("cost", actions.cost, "Show what runs have cost, by owner, task, user, GPU, day or tag")
    cost.add_argument("--by", type=_group, default="owner", help=f"{COST_KEYS} (default: owner)")
    since = "only runs submitted within this duration, such as 7d, or since this date"
    cost.add_argument("--since", type=_since, help=since)
    cost.add_argument("--until", type=_until, help="only runs submitted before this, likewise")
    cost.add_argument("--csv", action="store_true", help="print CSV")
    _output(cost)

    doctor = add("doctor", actions.doctor, "Check the way from this machine to a run, and name what to do")
    doctor.add_argument("--run", help="a running run whose container is logged in to")
    _output(doctor)
    return parser


def _output(command: argparse.ArgumentParser) -> None:
    command.add_argument("-o", "--output", choices=("text", "json"), default="text", help="default: text")
