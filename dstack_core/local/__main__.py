"""Run an embedded dstack server until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence

from dstack_core.local.server import LocalServer

_INTRODUCTION = """\
Embedded dstack server at {url} (stop it with Ctrl-C).
Jobs run as processes on this machine, with your rights; nothing is kept after the server has ended.

Point the shell at it:
  export DSTACK_SERVER_URL={url}
  export DSTACK_PROJECT={project}
  export DSTACK_TOKEN={token}

or put this into ~/.dstack/config.yml:
  projects:
    - name: {project}
      url: {url}
      token: {token}
      default: true
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; return the exit status, 1 if the server cannot start."""
    parser = argparse.ArgumentParser(prog="python -m dstack_core.local", description=__doc__)
    parser.add_argument("--port", type=int, default=3000, help="port on 127.0.0.1; 0 means any free one")
    parser.add_argument("--project", default="main", help="name of the project")
    parser.add_argument("--token", default=None, help="token of the user; a random one by default")
    options = parser.parse_args(arguments)
    # Install the handlers first: a signal during the start would leave processes behind.
    stop_requested = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop_requested.set())
    server = LocalServer(options.port, project=options.project, token=options.token)
    try:
        server.start()
    except (OSError, ValueError, ImportError) as error:
        print(getattr(error, "strerror", None) or error, file=sys.stderr)
        return 1
    try:
        text = _INTRODUCTION.format(url=server.url, project=server.project, token=server.token)
        print(text, flush=True)
        stop_requested.wait()
    finally:
        server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
