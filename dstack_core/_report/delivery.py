"""Prepare a run to report: a command before its own ones, and the file ``dstack_report.py``.

The problem: a result has to leave any image, also one with nothing but a POSIX shell, and only if the
commands succeed. dstack joins the commands with ``&&`` in one shell, so a command behind the last one would
not run after ``exit 0``.

The idea: the first command names the result file and sets a trap on the shell's end. If the shell ends with
status 0 and the file has content, the trap writes it to the log as a ``result`` message. The trap is gone if
a command replaces the shell (``exec``) or sets a trap on ``EXIT`` of its own.

Invariants: the file is not created here, so that ``set -C`` does not keep the commands from writing it. The
status of the commands is never changed, except for a result that is too large, which must not get lost.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path, PurePosixPath

from dstack_core._report.one_line import one_line
from dstack_core._wire.code import Upload
from dstack_core.errors import ConfigurationError
from dstack_core.models.configurations import Configuration, Task
from dstack_core.models.reports import DEFAULT_MAX_BYTES

MODULE_PATH = "~/.dstack/report/dstack_report.py"
_FOLDER = str(PurePosixPath(MODULE_PATH).parent).replace("~", "$HOME", 1)
# A terminal takes 4096 bytes at once; the mark, the number and the checksum need the rest.
_PIECE = 3000
# Shells that know what the command below uses. Another one, such as fish, gets no result file.
SHELLS = frozenset({"sh", "bash", "dash", "ash", "ksh", "zsh"})

# ``tr`` is much faster than a loop of ``read``, which a bare shell falls back to. Without ``fold`` or
# ``cksum`` the result is one line, which another process can interrupt. Parts are in base64 where the image
# has it: a runner replaces a character that is cut in two (seen on 0.18.44 and 0.22.5). dstack joins
# the commands with &&: without the last line, a first command such as "serve & train" would take the trap
# with it into the background.
_COMMAND = r"""
dstack_result() (
  status=$?
  [ -f "$DSTACK_RESULT_FILE" ] || exit 0
  trap 'rm -f "$DSTACK_RESULT_FILE" 2>/dev/null || : >| "$DSTACK_RESULT_FILE"' EXIT
  [ "$status" = 0 ] && [ "${DSTACK_NODE_RANK:-0}" = 0 ] && [ -s "$DSTACK_RESULT_FILE" ] || exit 0
  LC_ALL=C
  if command -v tr >/dev/null; then json=$(tr '\r\n' '  ' < "$DSTACK_RESULT_FILE")
  else json= ret=$(printf '\r')
    while IFS= read -r line || [ -n "$line" ]; do json="$json${line%"$ret"} "; done < "$DSTACK_RESULT_FILE"
  fi
  if [ "${#json}" -gt LIMIT ]; then
    echo "DSTACK_RESULT_FILE: expected at most LIMIT bytes, got ${#json}. Write what is large to a volume or\
 a bucket, and report where it is." >&2
    exit 1
  fi
  json="{\"kind\":\"result\",\"value\":$json}"
  if [ "${#json}" -gt PIECE ] && command -v fold >/dev/null && command -v cksum >/dev/null; then
    if command -v base64 >/dev/null; then json=$(printf %s "$json" | base64 | tr -d '\r\n'); fi
    sum=$(printf %s "$json" | cksum) number=0 total=$(((${#json} + PIECE - 1) / PIECE))
    printf '%s\n' "$json" | fold -b -w PIECE | while IFS= read -r piece; do
      number=$((number + 1))
      printf '%s\n' "::dstack:result$$:$number/$total:${sum%% *}:$piece"
    done
  else printf '%s\n' "::dstack::$json"; fi
)
DSTACK_RESULT_FILE=${TMPDIR:-/tmp}
[ -w "$DSTACK_RESULT_FILE" ] || DSTACK_RESULT_FILE=$PWD
case $DSTACK_RESULT_FILE in [!/]*) DSTACK_RESULT_FILE=$PWD/$DSTACK_RESULT_FILE ;; esac
DSTACK_RESULT_FILE=$DSTACK_RESULT_FILE/.dstack-result-${DSTACK_RUN_NAME:-run}-$$
while [ -e "$DSTACK_RESULT_FILE" ]; do DSTACK_RESULT_FILE=$DSTACK_RESULT_FILE-; done
export DSTACK_RESULT_FILE PYTHONPATH="FOLDER${PYTHONPATH:+:$PYTHONPATH}"
trap 'dstack_result || exit 1' EXIT
:
""".strip()


def command() -> str:
    """Return the command that a run which reports starts with."""
    text = _COMMAND.replace("LIMIT", str(DEFAULT_MAX_BYTES)).replace("PIECE", str(_PIECE))
    return one_line(text.replace("FOLDER", _FOLDER))


def reports_of(configuration: Configuration, option: object) -> bool:
    """Whether the option ``reports`` is set, and the run has commands that a shell joins.

    Raises ``ConfigurationError`` unless the option is True, False or None.
    """
    if option is not None and not isinstance(option, bool):
        raise ConfigurationError(f"reports: expected True or False, got {option!r}.")
    return (
        option is True
        and isinstance(configuration, Task)
        and bool(configuration.commands)
        and configuration.entrypoint is None
        and (configuration.shell is None or PurePosixPath(configuration.shell).name in SHELLS)
    )


def with_command(configuration: Configuration) -> Configuration:
    """Return the configuration with the command in front of its own ones."""
    return configuration.model_copy(update={"commands": [command(), *(configuration.commands or ())]})


def module_upload() -> Upload:
    """Return ``dstack_report.py`` as an archive; the same bytes from every installation."""
    data = Path(__file__).with_name("dstack_report.py").read_bytes()
    member = tarfile.TarInfo("dstack_report.py")
    member.size, member.mode = len(data), 0o644
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member, io.BytesIO(data))
    return Upload.of("reports", "Set reports=False", buffer.getvalue(), [("dstack_report.py", len(data))])
