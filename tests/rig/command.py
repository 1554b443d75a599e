"""The part of a job's command that may run on this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence

# The server puts the setup of its default image before the commands of the user. It ends where the virtual
# environment of that image is activated; its text differs from version to version (0.19 activates it twice).
_PREAMBLE = re.compile(r"\A.*?/bin/activate[^&]*&& (?:\. /dstack/venv/bin/activate && )?", re.DOTALL)
# Elsewhere in a command, a folder of that name is a folder of this machine.
_CONTAINER_ONLY = re.compile(r"(?<![\w./~-])/dstack/")


class UnsafeCommandError(Exception):
    """A command that would write outside the folder of its job."""


def without_preamble(argv: Sequence[str], *, default_image: bool) -> list[str]:
    """Return the command without the setup of the default image.

    That setup writes into `/dstack` of the machine, so a text not recognised raises `UnsafeCommandError`.
    """
    if not default_image or not argv:
        return list(argv)
    *shell, script = argv
    script = _PREAMBLE.sub("", script, count=1)
    if _CONTAINER_ONLY.search(script):
        raise UnsafeCommandError("expected the known setup of the default image, got another text")
    return [*shell, script]
