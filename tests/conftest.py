"""Settings of all tests."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import pytest

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

# Where a deprecated call, a file or socket that is left open, or an error that nothing catches (in a destructor,
# in a thread), fails the test during which it shows. The hosts have too many of their own.
_STRICT = [Path(__file__).parent / folder for folder in ("core", "local", "documented", "docs")]
_ERRORS = [
    "error::DeprecationWarning",
    "error::PendingDeprecationWarning",
    "error::ResourceWarning",
    "error::pytest.PytestUnraisableExceptionWarning",
    "error::pytest.PytestUnhandledThreadExceptionWarning",
    # The lowest Starlette that is allowed imports this package by its former name.
    "ignore:Please use `import python_multipart`:PendingDeprecationWarning",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let warnings be errors in the tests of the core."""
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in _STRICT):
            # In front: the filters of a test replace these.
            item.add_marker(pytest.mark.filterwarnings(*_ERRORS), append=False)
