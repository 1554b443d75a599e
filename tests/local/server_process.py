"""The embedded server in a process of its own."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def serving_apart() -> Iterator[dict[str, Any]]:
    """Start ``python -m dstack_core.local``; give the arguments of its clients."""
    command = [sys.executable, "-m", "dstack_core.local", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            told = ""
            while "default: true" not in told:
                line = process.stdout.readline()
                assert line, told
                told += line
            found = dict(re.findall(r"export DSTACK_(\w+)=(\S+)", told))
            names = {"server_url": "SERVER_URL", "project_name": "PROJECT", "user_token": "TOKEN"}
            yield {name: found[variable] for name, variable in names.items()}
        finally:
            process.terminate()
