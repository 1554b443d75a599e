"""The embedded server in a process of its own."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any


def first_words(process: subprocess.Popen[str]) -> str:
    """Return what ``python -m dstack_core.local`` prints when it starts to serve."""
    assert process.stdout is not None
    text = ""
    while "default: true" not in text:
        line = process.stdout.readline()
        assert line, text
        text += line
    return text


@contextlib.contextmanager
def serving_apart() -> Iterator[dict[str, Any]]:
    """Start ``python -m dstack_core.local``; yield the arguments of its clients."""
    command = [sys.executable, "-m", "dstack_core.local", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            found = dict(re.findall(r"export DSTACK_(\w+)=(\S+)", first_words(process)))
            names = {"server_url": "SERVER_URL", "project_name": "PROJECT", "user_token": "TOKEN"}
            yield {name: found[variable] for name, variable in names.items()}
        finally:
            process.terminate()
