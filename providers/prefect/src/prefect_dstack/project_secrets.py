"""``with sync_secrets(...)``: secrets of Prefect as project secrets of dstack, so that runs get references.

The problem: the server returns the environment of a run in clear text to every member of the project.

The idea: the value becomes a secret of the project, and the run's environment has ``${{ secrets.NAME }}``. A
project secret has a name and nothing else, so the name holds its owner: ``prefect_f_<flow run>_...``. Each
flow run has secrets of its own, another execution of it replaces them, and the hooks and the reaper know from
the name whose they are.

The invariants: a value is sent to the server and put in the list of what is masked, nowhere else. A secret
under a name of the user's is replaced only with ``overwrite=True``, since nothing shows whose it is.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import anyio
from prefect.exceptions import TerminationSignal

from prefect_dstack._cancellation import StopRequested
from prefect_dstack._checks import check_seconds, check_switches
from prefect_dstack._current_secrets import enter_secrets, leave_secrets
from prefect_dstack._resource_names import identify_secret, resource_owner
from prefect_dstack._secrets import is_secret, plain
from prefect_dstack._waits import run_logger
from prefect_dstack.credentials import CredentialsLike, aload, load, open_async_client, open_client

if TYPE_CHECKING:
    from contextvars import Token
    from types import TracebackType

    from prefect_dstack.credentials import DstackCredentials

_INTERRUPTS = (TerminationSignal, SystemExit, asyncio.CancelledError, StopRequested)
# As for a fleet: Prefect kills an interrupted process 30 s after the signal.
_BEFORE_THE_KILL_SECONDS = 6.0
_DELETE_SECONDS = 60.0
# What a reference of dstack may name (its server's interpolation).
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# A server takes 200 characters, of which the owner in a generated name needs up to 60.
_LONGEST_NAME = 100


class sync_secrets:  # Read as a statement: with sync_secrets(...)
    """Secrets of Prefect as project secrets of dstack, for the time of a ``with`` or ``async with``.

    Entering the block sets the secrets and returns a dict for ``env`` of its runs, such as
    ``{"HF_TOKEN": "${{ secrets.prefect_f_..._HF_TOKEN }}"}``: no value stands in a run's environment. Logs of
    runs with such a reference show ``***`` wherever this process relays them. Leaving the block deletes the
    secrets, also by an exception or a cancellation; wait for its runs inside. If the process dies first, the
    hooks of this package or its reaper delete them. Servers before 0.19.17 have no project secrets.

    Without ``keep`` it is an error outside of a flow or task, as nothing could find secrets that a killed
    process left. So it is in a thread that a flow starts, unless its function runs in
    ``contextvars.copy_context()``.

    It raises ``ConfigurationError``, ``UnsupportedServerError`` on an older server, and the other server
    errors. Leaving it raises no error of a server: what could not be deleted is logged.

    Args:
        secrets: ``Secret`` blocks or ``SecretStr`` by the name that the run's variable has.
        credentials: A ``DstackCredentials`` block, the name of a saved one, or None for the environment and
            ``~/.dstack/config.yml``.
        keep: Set them for good, under the names given, for all runs of the project. Default: False.
        overwrite: With ``keep``, replace secrets that the project has under these names. Default: False,
            they are refused: the server does not show whose they are.
        retry_budget: Seconds to keep retrying an unreachable server. Default: 600.

    Example:
        ```python
        from prefect import flow
        from prefect.blocks.system import Secret

        from dstack_core import Task
        from prefect_dstack import run_task, sync_secrets


        @flow
        def train() -> None:
            with sync_secrets({"HF_TOKEN": Secret.load("hf-token")}) as env:
                run_task(Task(commands=["python train.py"]), env=env)
        ```
    """

    def __init__(
        self,
        secrets: Mapping[str, Any],
        credentials: CredentialsLike = None,
        *,
        keep: bool = False,
        overwrite: bool = False,
        retry_budget: float = 600.0,
    ) -> None:
        check_switches(keep=keep, overwrite=overwrite)
        check_seconds(retry_budget=retry_budget)
        if overwrite and not keep:
            _refuse(
                "overwrite: expected keep=True with it, got keep=False. Secrets of a block have new names."
            )
        self._values = _checked(secrets)
        self._credentials = credentials
        self._keep = keep
        self._overwrite = overwrite
        self._retry_budget = retry_budget
        self._names: dict[str, str] = {}
        self._block: DstackCredentials | None = None
        self._token: Token[tuple[str, ...]] | None = None
        self._logger: Any = None

    def __repr__(self) -> str:
        return f"sync_secrets({sorted(self._values)})"

    def __enter__(self) -> dict[str, str]:
        self._block = load(self._credentials)
        self._prepare()
        try:
            with open_client(self._block, retry_budget=self._retry_budget) as client:
                if self._keep and not self._overwrite:
                    self._refuse_taken({one.name for one in client.secrets.list()})
                for variable, name in self._names.items():
                    client.secrets.set(name, self._values[variable])
        except BaseException:
            self._delete(_BEFORE_THE_KILL_SECONDS)
            raise
        return self._entered()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave()
        self._delete(_seconds(error))

    async def __aenter__(self) -> dict[str, str]:
        self._block = await aload(self._credentials)
        self._prepare()
        try:
            async with open_async_client(self._block, retry_budget=self._retry_budget) as client:
                if self._keep and not self._overwrite:
                    self._refuse_taken({one.name for one in await client.secrets.list()})
                for variable, name in self._names.items():
                    await client.secrets.set(name, self._values[variable])
        except BaseException:
            await self._adelete(_BEFORE_THE_KILL_SECONDS)
            raise
        return self._entered()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave()
        await self._adelete(_seconds(error))

    def _prepare(self) -> None:
        self._logger = run_logger()
        if self._keep:
            self._names = {variable: variable for variable in self._values}
        else:
            owner = resource_owner("sync_secrets", f"secrets {sorted(self._values)}")
            self._names = {variable: identify_secret(owner, variable) for variable in self._values}

    def _refuse_taken(self, present: set[str]) -> None:
        if taken := sorted(present.intersection(self._names)):
            # Nothing was set: nothing is deleted either.
            _refuse(
                f"secrets: expected names that are free in the project, got {', '.join(taken)}. Set "
                "overwrite=True to replace their values, or choose other names."
            )

    def _entered(self) -> dict[str, str]:
        self._token = enter_secrets(
            {self._names[variable]: value for variable, value in self._values.items()}
        )
        self._logger.info("Project secrets are set: %s.", ", ".join(self._names.values()))
        return {variable: f"${{{{ secrets.{name} }}}}" for variable, name in self._names.items()}

    def _leave(self) -> None:
        if self._token is None:
            raise RuntimeError("sync_secrets: expected the end of a with that was entered, got another call")
        leave_secrets(self._token)
        self._token = None

    def _delete(self, seconds: float) -> None:
        if self._keep:
            return
        try:
            with open_client(self._block, retry_budget=seconds) as client:
                for name in self._names.values():
                    client.secrets.delete(name)
        except Exception as error:
            self._log_failure(error)

    async def _adelete(self, seconds: float) -> None:
        if self._keep:
            return
        with anyio.CancelScope(shield=True):
            try:
                async with open_async_client(self._block, retry_budget=seconds) as client:
                    for name in self._names.values():
                        await client.secrets.delete(name)
            except Exception as error:
                self._log_failure(error)

    def _log_failure(self, error: Exception) -> None:
        from dstack_core import UnsupportedServerError

        if not isinstance(error, UnsupportedServerError):
            self._logger.error(
                "Project secrets could not be deleted: %s. Delete them, or let the reaper of prefect-dstack "
                "do it: %s.",
                str(error).rstrip("."),
                ", ".join(self._names.values()),
            )


def _seconds(error: BaseException | None) -> float:
    return _BEFORE_THE_KILL_SECONDS if isinstance(error, _INTERRUPTS) else _DELETE_SECONDS


def _checked(secrets: object) -> dict[str, str]:
    if not isinstance(secrets, Mapping) or not secrets:
        _refuse(
            'secrets: expected Secret blocks by name, such as {"HF_TOKEN": Secret.load("hf-token")}, got '
            f"{'none' if isinstance(secrets, Mapping) else type(secrets).__name__}."
        )
    for name, value in secrets.items():
        if isinstance(name, str) and len(name) > _LONGEST_NAME:
            _refuse(
                f"secrets: expected a name of at most {_LONGEST_NAME} characters, got {name[:20]}... with "
                f"{len(name)}."
            )
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            _refuse(f"secrets: expected a name of letters, digits and underscores, got {name!r}.")
        if not is_secret(value):
            _refuse(f"secrets: expected a Secret block or SecretStr for {name}, got {type(value).__name__}.")
        held = plain(value)
        if not isinstance(held, str) or not held:
            kind = "an empty text" if held == "" else type(held).__name__
            _refuse(f"secrets: expected a text in the secret for {name}, got {kind}.")
    return {name: plain(value) for name, value in secrets.items()}


def _refuse(message: str) -> NoReturn:
    from dstack_core import ConfigurationError

    raise ConfigurationError(message)
