"""The rig's jobs, without a server."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.rig.job import Job
from tests.rig.journal import Journal


def test_a_program_that_closes_its_terminal_gets_no_sighup(tmp_path: Path) -> None:
    journal = Journal()
    job = Job(journal, tmp_path)
    closes = "import os, time; [os.close(number) for number in (0, 1, 2)]; time.sleep(0.5)"
    job.start([sys.executable, "-I", "-S", "-c", closes], {}, tmp_path, None)
    deadline = time.monotonic() + 30
    while (state := journal.pull(0)["job_states"][-1])["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (state["state"], state["exit_status"]) == ("done", 0)
