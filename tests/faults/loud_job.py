"""Print numbered lines of 100 bytes at a given rate: ``loud_job.py SECONDS BYTES_PER_SECOND``; the job of a run."""

from __future__ import annotations

import os
import sys
import time

LINE = "%010d-" + "x" * 88 + "\n"
# Lines to write at once, 50 kB: fewer than the server reads at once (64 KiB).
_PIECE = 500


def main(seconds: float, pace: float) -> None:
    """Write the lines that are due, and no more."""
    began = time.monotonic()
    total = round(seconds * pace / 100)
    written = 0
    while written < total:
        due = min(total, round((time.monotonic() - began) * pace / 100), written + _PIECE)
        if due == written:
            time.sleep(0.001)
            continue
        left = "".join(LINE % number for number in range(written, due)).encode()
        while left:
            left = left[os.write(1, left) :]
        written = due
    os.write(1, b"took %.2f s\n" % (time.monotonic() - began))


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]))
