"""Hide secrets in what a flow logs and raises: this file is sent to the machine beside ``_bundle_main``.

The problem: Prefect on the machine sends the log and the states of the flow run to its server by itself, past
the caller, which masks what a run prints. The caller's values should not travel a second time either.

The idea: the caller sends the names of the variables that hold secrets, and which part of a value is one. A
factory of log records, which the standard library has for this, masks each record before any handler gets
it, also with ``log_prints``. The flow's function is wrapped, so that the error that it raises holds no secret
when Prefect makes a state of it. The process that runs the flow imports this file by itself.

Invariants: Python 3.8 can read this file, it needs no other package, and no error in here fails a flow. What
Prefect makes of the error of a task in the flow is not seen here: its log is masked, its state is not.
"""

from __future__ import annotations

import json
import logging
import os
import re
import traceback
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

VARIABLE = "DSTACK_FLOW_SECRETS"
"""The environment variable with the names as JSON, and for each the parts of its value that are secret."""
_MASK = "***"
# As in ``dstack_core``: shorter texts are common words, and masking them makes a log unreadable.
_SHORTEST = 5
# What ``str()`` of an OSError is made of, beside its arguments.
_OF_OSERROR = ("strerror", "filename", "filename2")


def secrets_here() -> list[str]:
    """Return the lines of the secrets in this environment, the longest first."""
    found: set[str] = set()
    for name, parts in json.loads(os.environ.get(VARIABLE) or "{}").items():
        value = os.environ.get(name, "")
        for start, end in parts or [[0, len(value)]]:
            found.update(value[start:end].splitlines(), unquote(value[start:end]).splitlines())
    # Of two secrets that begin alike, nothing of the longer one may be left.
    return sorted((line for line in found if len(line) >= _SHORTEST), key=len, reverse=True)


class Hider:
    """A set of secrets, and their replacement by ``***``."""

    def __init__(self, secrets: list[str]) -> None:
        self._pattern = re.compile("|".join(map(re.escape, secrets))) if secrets else None

    def mask(self, text: str) -> str:
        """Return ``text`` with ``***`` for what is secret in it."""
        return text if self._pattern is None else self._pattern.sub(_MASK, text)

    def hide_in_logs(self) -> None:
        """Mask all log records of this process from now on."""
        make = logging.getLogRecordFactory()

        def make_masked(*args: Any, **kwargs: Any) -> logging.LogRecord:
            record = make(*args, **kwargs)
            # For example a value whose text cannot be made; logging reports that.
            with suppress(Exception):
                self._hide_in(record)
            return record

        if self._pattern is not None:
            logging.setLogRecordFactory(make_masked)

    def _hide_in(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            text = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
            if self.mask(text) != text:
                # A formatter takes the text where it is set.
                record.exc_text, record.exc_info = self.mask(text), None
        text = record.getMessage()
        if self.mask(text) != text:
            record.msg, record.args = self.mask(text), ()

    def hide_in_error(self, error: Exception) -> Exception:
        """Return the error without secrets: the same object, or another with its text if it cannot change."""
        pending: list[BaseException | None] = [error]
        seen: set[int] = set()
        while pending:
            one = pending.pop()
            if one is None or id(one) in seen:
                continue
            seen.add(id(one))
            pending += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
            # The check below finds what is left.
            with suppress(Exception):
                self._hide_in_fields(one)
        shown = f"{error} {error!r}"
        if self.mask(shown) == shown:
            return error
        return RuntimeError(self.mask(f"{type(error).__name__}: {error}"))

    def _hide_in_fields(self, error: BaseException) -> None:
        if self._value(error.args) != error.args:
            error.args = self._value(error.args)
        for name in [*vars(error), *_OF_OSERROR]:
            value = getattr(error, name, None)
            if self._value(value) != value:
                setattr(error, name, self._value(value))

    def _value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.mask(value)
        if isinstance(value, bytes):
            text = value.decode("latin-1")
            return value if self.mask(text) == text else self.mask(text).encode("latin-1")
        if type(value) in (list, tuple):
            return type(value)(map(self._value, value))
        if type(value) is dict:
            return {self._value(name): self._value(item) for name, item in value.items()}
        return value


_hider = None


def hider() -> Hider:
    """Return that of this process; the first call also masks the process's log."""
    global _hider
    if _hider is None:
        try:
            _hider = Hider(secrets_here())
        except ValueError:
            # Another program's variable of this name.
            _hider = Hider([])
        _hider.hide_in_logs()
    return _hider
