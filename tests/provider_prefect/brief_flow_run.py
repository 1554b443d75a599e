"""A flow run without Prefect: it only sets its states, so that a hundred of them fit on a small machine.

``python -S -E brief_flow_run.py FILE`` ends once the file exists.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from pathlib import Path


def set_state(kind: str) -> None:
    """Set the state of the flow run, and try again while Prefect's server does not answer."""
    address = f"{os.environ['PREFECT_API_URL']}/flow_runs/{os.environ['PREFECT__FLOW_RUN_ID']}/set_state"
    body = json.dumps({"state": {"type": kind}, "force": True}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    for _ in range(100):
        try:
            with urllib.request.urlopen(request, timeout=60):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("Prefect's server does not answer")


if __name__ == "__main__":
    set_state("RUNNING")
    while not Path(sys.argv[1]).exists():
        time.sleep(0.1)
    set_state("COMPLETED")
