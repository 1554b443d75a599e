"""Settings of all tests."""

from __future__ import annotations

import contextlib
import signal

# A shell that starts the tests in the background lets them ignore SIGINT, and nohup SIGHUP; child processes
# inherit both, and shells that are ended by SIGHUP would stay.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The environments of the hosts have no Hypothesis. Its deadline of 200 ms an example would make tests fail on a
# busy machine.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("no-deadline", deadline=None)
    settings.load_profile("no-deadline")
