"""Restart the triggerer whenever it ends, as a process supervisor does in production."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from tests.provider_airflow.components import Components

_LOOK_SECONDS = 0.5


class TriggererKeeper:
    """A supervisor of the triggerer of ``components``; ``restarts`` counts how often it restarted it."""

    def __init__(self, components: Components) -> None:
        self.restarts = 0
        self._components = components
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="triggerer-keeper")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._closing.is_set():
            if self._components.ended_within(_LOOK_SECONDS, "triggerer"):
                # Its log server outlives it and holds the port.
                self._components.end_one("triggerer")
                self._components.start_one("triggerer")
                self.restarts += 1
