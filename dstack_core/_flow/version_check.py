"""Ask for the server's version when it matters, and say what a server is too old for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from dstack_core._flow.steps import Flow, Op, call
from dstack_core._wire import versions
from dstack_core._wire.api import Api
from dstack_core.errors import ServerError

T = TypeVar("T")


class Gates:
    """Know one server's version: asked at most once, and only where it decides something."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._asked = False
        self._release: versions.Release | None = None

    def guarding(self, flow: Flow[T], needs: Sequence[str] = (), *, ask_first: bool = False) -> Flow[T]:
        """Run ``flow``; a refusal that an old server gives is told together with the server's version.

        With ``ask_first`` nothing of the flow is done on a server that lacks one of ``needs``. Without
        needs the version is asked only after a refusal. Raises ``UnsupportedServerError``.
        """
        if needs and ask_first:
            versions.check(needs, (yield from self.release()), self._api.server_url)
        try:
            return (yield from flow)
        except ServerError as error:
            if not versions.may_tell_an_old_server(error):
                raise
            release = yield from self._ask_once_more(error)
            told = versions.explain(error, needs, release, self._api.server_url)
            if told is error:
                raise
            raise told from None

    def release(self, *, patient: bool = True) -> Op[versions.Release | None]:
        """Return the server's version, None when it does not say; asked once."""
        if not self._asked:
            self._release = yield from call(replace(self._api.get_release(), idempotent=patient))
            self._asked = True
        return self._release

    def _ask_once_more(self, refusal: ServerError) -> Op[versions.Release | None]:
        try:
            return (yield from self.release(patient=False))
        except ServerError:
            # What the caller has to hear of is the refusal.
            raise refusal from None
