"""What holds for all tests."""

from __future__ import annotations

import signal

# A shell that started the tests in the background has left SIGINT ignored, and what they start inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
