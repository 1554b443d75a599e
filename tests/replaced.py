"""Replace a function of the standard library for one module: threads and other modules keep the real one."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


def replace_in(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, **functions: Any) -> None:
    """Let `module`, which imports the module `name`, see other functions in it."""
    monkeypatch.setattr(module, name, SimpleNamespace(**{**vars(getattr(module, name)), **functions}))
