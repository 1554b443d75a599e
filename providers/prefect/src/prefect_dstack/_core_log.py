"""Show in a flow run's log what the client warns of while it submits, such as code that is uploaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_receiver: ContextVar[Any] = ContextVar("prefect_dstack_log", default=None)


class _Relay(logging.Handler):
    """One handler for all tasks of the process; each thread and each async task has its own receiver."""

    def emit(self, record: logging.LogRecord) -> None:
        if (logger := _receiver.get()) is not None:
            logger.log(record.levelno, "%s", record.getMessage())


_relay = _Relay(level=logging.WARNING)


@contextmanager
def client_warnings_in(logger: Any) -> Iterator[None]:
    """Relay the client's warnings to ``logger``."""
    # A second addHandler of the same handler changes nothing.
    logging.getLogger("dstack_core").addHandler(_relay)
    token = _receiver.set(logger)
    try:
        yield
    finally:
        _receiver.reset(token)
