"""Settings of all tests."""

from __future__ import annotations

import contextlib
import signal

# A shell that starts the tests in the background lets them ignore SIGINT, and their child processes inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The environments of the hosts have no Hypothesis. Its deadline of 200 ms an example would make tests fail on a
# busy machine.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("no-deadline", deadline=None)
    settings.load_profile("no-deadline")
