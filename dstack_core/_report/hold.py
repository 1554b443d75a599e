"""Prepare a run to hold its container after its commands have failed, so that a person can look around in it.

The problem: when the commands fail, the container is gone within seconds, and with it what would explain the
failure. Starting it again costs an hour, and often it does not fail again.

The idea: a command before the run's own ones sets a trap on the shell's end. If the shell ends with another
status than 0, the trap shows how to get in, reports ``held`` to the follower of the run, and waits: for the
seconds that were asked for, for a file that means "done", or for a signal. Then the shell ends with
the status that the commands had. It waits no longer than ``max_duration`` leaves, and not at all for a few
seconds; the runner counts that from the start of the shell, too.

Invariants: commands that succeed take no longer. The wait counts seconds by itself, so it ends without a
watcher. A stop ends it at once: the runner's SIGINT interrupts ``wait`` (a foreground ``sleep`` would delay
it), and commands that a stop has ended are not held at all. No trap runs after ``exec`` or a SIGKILL of the
shell itself, and one that the commands set on ``EXIT`` replaces this one: then nothing is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from dstack_core._report.delivery import SHELLS
from dstack_core._report.one_line import one_line
from dstack_core.errors import ConfigurationError
from dstack_core.models.configurations import Configuration, Task
from dstack_core.models.debug import HOLD_PREFIX, Hold, attach_command
from dstack_core.models.durations import format_duration
from dstack_core.models.options import hold_seconds

# A signal ends the shell, as it does without the traps. In the trap on EXIT, options of the commands (-e, -u,
# -x) must not end or echo it. An interactive shell, which dstack starts, prints a line for each background
# process: hence 2>/dev/null. Only an interrupted wait leaves a sleep to kill; another process may have the
# number of an earlier one. The file that means "done" is in a folder that can be written, that has the same
# name from everywhere, and that can be pasted without quotes. dstack joins the commands with &&: without the
# last line, a first command such as "serve & train" would take the trap with it into the background.
_COMMAND = r"""
PREFIXSECONDS
dstack_stopped= dstack_words='WORDS'
BEGAN
dstack_hold() {
  { set +eux; } 2>/dev/null
  RESULT
  [ "$1" != 0 ] || exit 0
  [ -z "$dstack_stopped" ] || exit "$1"
  BUTNOT
  if ! command -v sleep >/dev/null; then
    echo "debug_on_failure: expected the command sleep in the image, got none. The container is not held." >&2
    exit "$1"
  fi
  LEFT
  for dstack_done in "${TMPDIR:-/tmp}" /tmp "$PWD" /; do
    case $dstack_done in [!/]*|*[!a-zA-Z0-9/._-]*) continue ;; esac
    dstack_done=${dstack_done%/}/dstack-done-${DSTACK_RUN_NAME:-run}-$$
    (: >> "$dstack_done") 2>/dev/null && rm -f "$dstack_done" && break
  done
  dstack_node=${DSTACK_NODE_RANK:-0} dstack_nodes=${DSTACK_NODES_NUM:-1} dstack_option=
  case $dstack_node$dstack_nodes in *[!0-9]*) dstack_node=0 dstack_nodes=1 ;; esac
  [ "$dstack_node" = 0 ] || dstack_option=" --node $dstack_node"
  dstack_held=0
  trap 'dstack_stopped=1' INT TERM HUP
  printf '%s\n' "The commands exited with status $1. The container is held for $dstack_words." \
"To open a shell in it: ATTACH$dstack_option" "To end it: touch $dstack_done"
  printf '%s\n' "::dstack::{\"kind\":\"held\",\"exit_status\":$1,\"seconds\":$dstack_hold_seconds,\
\"done\":\"$dstack_done\",\"nodes\":$dstack_nodes,\"node\":$dstack_node}"
  while [ "$dstack_held" -lt "$dstack_hold_seconds" ] && [ -z "$dstack_stopped" ] && [ ! -e "$dstack_done" ]
  do
    { sleep 1 & wait "$!"; } 2>/dev/null
    dstack_held=$((dstack_held + 1))
  done
  [ -z "$dstack_stopped" ] || { kill "$!"; } 2>/dev/null
  rm -f "$dstack_done"
  printf '%s\n' "::dstack::{\"kind\":\"released\",\"seconds\":$dstack_held}"
  exit "$1"
}
trap 'dstack_stopped=1; exit 130' INT
trap 'dstack_stopped=1; exit 143' TERM
trap 'dstack_stopped=1; exit 129' HUP
trap 'dstack_hold "$?"' EXIT
:
""".strip()
# With a max_duration; an image without a clock (the command date) is held for as long as was asked.
_BEGAN = "dstack_began=$(date +%s 2>/dev/null)"
_LEFT = r"""
dstack_now=$(date +%s 2>/dev/null)
case ${dstack_began:-x}${dstack_now:-x} in *[!0-9]*) dstack_left=$dstack_hold_seconds ;;
*) dstack_left=$((LIMIT + dstack_began - dstack_now)) ;; esac
[ "$dstack_left" -gt 0 ] || dstack_left=0
if [ "$dstack_left" -lt "$dstack_hold_seconds" ]; then
  if [ "$dstack_left" -lt 10 ]; then
    printf '%s\n' "debug_on_failure: expected 10 s or more until max_duration, got $dstack_left s. \
The container is not held." >&2
    exit "$1"
  fi
  dstack_hold_seconds=$dstack_left dstack_words="$dstack_left s, until max_duration ends the run"
  [ "$dstack_left" -lt 120 ] || dstack_words="$((dstack_left / 60)) min, until max_duration ends the run"
fi
""".strip()
# What a run with reports does at its end, see ``delivery``; a result that is too large fails the run.
_RESULT = '(exit "$1"); dstack_result || set -- 1'


def held_on_failure(
    configuration: Configuration,
    option: object,
    *,
    reports: bool,
    retries_errors: bool,
    max_seconds: int | None,
) -> Configuration:
    """Return the configuration as the option ``debug_on_failure`` changes it.

    ``reports``: whether a command that reports comes first. ``retries_errors``: whether dstack starts a run
    again that has failed. ``max_seconds``: its ``max_duration``, if it has one. Raises ``ConfigurationError``
    for a wrong value, and for a run that cannot be held.
    """
    seconds = hold_seconds(option)
    if seconds is None:
        return configuration
    but_not = option.but_not if isinstance(option, Hold) else ()
    held = with_hold(configuration, seconds, reports=reports, but_not=but_not, max_seconds=max_seconds)
    if retries_errors:
        raise ConfigurationError(
            'debug_on_failure: expected a run without retry on "error", got one that dstack starts again. '
            'Set retry_policy={"on_events": ["no-capacity", "interruption"]}, and let the task be retried.'
        )
    return held


def with_hold(
    configuration: Configuration,
    seconds: int,
    *,
    reports: bool,
    but_not: Sequence[int] = (),
    max_seconds: int | None = None,
) -> Configuration:
    """Return the configuration with the command that holds the container in front of its own ones.

    ``reports``: whether a command that reports comes before it. ``but_not``: the exit statuses that do
    not hold. ``max_seconds``: what the commands and the hold may take together. Raises ``ConfigurationError``
    for a configuration whose end no shell sees.
    """
    if not isinstance(configuration, Task):
        raise ConfigurationError(
            f"debug_on_failure: expected a task, got type {configuration.type!r}. Leave the option out."
        )
    if configuration.entrypoint is not None:
        raise ConfigurationError(
            f"debug_on_failure: expected commands, got entrypoint {configuration.entrypoint!r}. "
            "Write it as a command."
        )
    if not configuration.commands:
        raise ConfigurationError(
            f"debug_on_failure: expected commands, got {configuration.commands!r}. "
            "Write as a command what the image starts."
        )
    if configuration.shell is not None and PurePosixPath(configuration.shell).name not in SHELLS:
        known = ", ".join(sorted(SHELLS))
        raise ConfigurationError(
            f"debug_on_failure: expected one of the shells {known}, got {configuration.shell!r}. "
            "Use one of them."
        )
    first = [] if not reports else configuration.commands[:1]
    rest = configuration.commands[len(first) :]
    command = _command(seconds, reports, but_not, max_seconds)
    return configuration.model_copy(update={"commands": [*first, command, *rest]})


def _command(seconds: int, reports: bool, but_not: Sequence[int], max_seconds: int | None) -> str:
    text = _COMMAND.replace("PREFIX", HOLD_PREFIX, 1).replace("SECONDS", str(seconds), 1)
    text = text.replace("WORDS", format_duration(seconds)).replace(
        "ATTACH", attach_command("${DSTACK_RUN_NAME:-NAME}")
    )
    statuses = "|".join(str(status) for status in but_not)
    text = text.replace("BUTNOT", f'case $1 in {statuses}) exit "$1" ;; esac' if but_not else ":", 1)
    text = text.replace("BEGAN", ":" if max_seconds is None else _BEGAN, 1)
    text = text.replace("LEFT", ":" if max_seconds is None else _LEFT.replace("LIMIT", str(max_seconds)), 1)
    return one_line(text.replace("RESULT\n", _RESULT + "\n" if reports else ":\n", 1))
