"""Find out the server's version where it matters, and explain what a server is too old for.

The problem: a server refuses a key it does not know with a message that does not name the version, and asking
for the version before each submit would cost every user a request.

The idea: ordinary runs need nothing that only some servers have, so the version is fetched only when a
configuration uses such a key (``needs``), or after a refusal that an old server may have caused.

Invariants: at most one version request for each client. Where a need is known beforehand, nothing is sent to
a server that lacks it. If the version request fails, the caller sees the first refusal, not that failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from dstack_core._flow.steps import Flow, Op, call
from dstack_core._wire import versions
from dstack_core._wire.api import Api
from dstack_core.errors import ServerError

T = TypeVar("T")


class VersionCheck:
    """The version of one server, fetched at most once, and only where it decides something."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._asked = False
        self._release: versions.Release | None = None

    def guarding(self, flow: Flow[T], needs: Sequence[str] = (), *, ask_first: bool = False) -> Flow[T]:
        """Run ``flow``; explain a refusal that an old server may give together with the server's version.

        With ``ask_first`` nothing of the flow is done on a server that lacks one of ``needs``. Without
        needs the version is fetched only after a refusal. Raises ``UnsupportedServerError``.
        """
        if needs and ask_first:
            versions.check(needs, (yield from self.release()), self._api.server_url)
        try:
            return (yield from flow)
        except ServerError as error:
            if not versions.may_mean_an_old_server(error):
                raise
            release = yield from self._release_or(error)
            explained = versions.explain(error, needs, release, self._api.server_url)
            if explained is error:
                raise
            raise explained from None

    def release(self, *, patient: bool = True) -> Op[versions.Release | None]:
        """Return the server's version, None when it does not report one.

        Without ``patient`` a fault is not retried.
        """
        if not self._asked:
            self._release = yield from call(replace(self._api.get_release(), idempotent=patient))
            self._asked = True
        return self._release

    def lacks(self, need: str) -> bool:
        """Return whether the server is known to lack a need; makes no request."""
        return versions.lacks(need, self._release)

    def lacks_after(self, refusal: ServerError, need: str) -> Op[bool]:
        """Return whether the server lacks a need, now that it has refused a request that uses it.

        Raises the refusal if the version cannot be fetched.
        """
        if not versions.may_mean_an_old_server(refusal):
            return False
        return versions.lacks(need, (yield from self._release_or(refusal)))

    def _release_or(self, refusal: ServerError) -> Op[versions.Release | None]:
        try:
            # Not retried: the version only makes the message of the refusal better, and retries would delay
            # that message by the whole budget.
            return (yield from self.release(patient=False))
        except ServerError:
            # The refusal is what the caller must see: it came first, and it is about the caller's request.
            raise refusal from None
