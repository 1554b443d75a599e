"""The embedded server: a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import atexit
import errno
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from dstack_core.local.faults import Faults
from dstack_core.local.locations import Places, read_regions
from dstack_core.local.scenarios import Scenarios
from dstack_core.local.seen import SeenRun, seen_runs

if TYPE_CHECKING:
    from dstack_core.client import Client
    from dstack_core.local.fault_middleware import FaultMiddleware, RecordedRequest
    from dstack_core.local.loop import ReadyServer
    from dstack_core.local.state import State

_MISSING = 'The embedded server needs packages that are not installed: pip install "dstack-core[local]"'
_NO_POSIX = (
    "The embedded server runs jobs on pseudo terminals: expected Linux or macOS, got a system without the "
    "module {module}. On Windows, start it in WSL; the clients work on Windows."
)
_ADDRESS = "127.0.0.1"
# How long ``stop`` waits for the server's thread: killing the jobs (2 s), reading their last output (5 s) and
# finishing requests (5 s) take less. A thread that is still alive then is left to the end of the process.
_STOP_SECONDS = 30.0


class LocalServer:
    """A server that speaks the REST protocol of dstack 0.22.5 and runs jobs as local processes.

    Use it as a context manager, or call `start` and `stop`. `stop` kills every process and removes the
    temporary directory. Both happen even if the Python process with the server is killed.

    Jobs run with the rights of the caller, without a container. A job that requests more than the simulated
    machine has, or sets a `max_price` below its price, fails for lack of capacity.

    Args:
        port: The port on 127.0.0.1; 0 means any free one.
        project: The name of the one project.
        token: The token of the one user. Default: a random one.
        gpus: How many GPUs the simulated machine has.
        gpu_name: The name of these GPUs.
        gpu_memory: The memory of each GPU, in GB.
        price: The price of the machine, in USD per hour.
        step_seconds: Seconds that a run stays in each status that it passes through.
        stop_grace_seconds: Seconds that a stopped job has to react to SIGINT before it is killed.
        retry_seconds: Seconds before the first retry of a run. The delay doubles with each retry.
        metrics_seconds: Seconds between two measurements of a running job's processes.
        gpu_usage: What each GPU of a running job shows, as (percent, GB), or a function of the seconds since
            the start that returns it. Default: no GPU is measured. The variable
            ``DSTACK_LOCAL_GPU_USAGE="PERCENT GB"`` of a run counts before it.
        needs_fleet: Whether runs need a fleet, as on a real server since 0.20. Default: a run that names no
            fleet runs in an implicit one, ``local``.
        instance_seconds: Seconds that an instance of a fleet stays in each status on its way up and down, and
            that a volume takes to be created and deleted.
        regions: Where the machine is offered: USD per hour by ``"BACKEND/REGION"``, such as
            ``{"aws/us-east-1": 1.2, "gcp/us-west1": 0.9}``. Jobs and fleets get the cheapest that their
            `backends`, `regions` and `max_price` allow. Default: one place, which `backends` and `regions`
            do not restrict, at `price`.

    Example:
        >>> with LocalServer() as server, server.client() as client:
        ...     run = client.runs.submit({"type": "task", "commands": ["echo hello"]})

    Source: PROTOCOL 1.4 to 1.8.
    """

    def __init__(
        self,
        port: int = 0,
        *,
        project: str = "main",
        token: str | None = None,
        gpus: int = 8,
        gpu_name: str = "A100",
        gpu_memory: float = 80.0,
        price: float = 1.2,
        step_seconds: float = 0.05,
        stop_grace_seconds: float = 10.0,
        retry_seconds: float = 0.2,
        metrics_seconds: float = 10.0,
        gpu_usage: Callable[[float], tuple[float, float]] | tuple[float, float] | None = None,
        needs_fleet: bool = False,
        instance_seconds: float = 0.1,
        regions: Mapping[str, float] | None = None,
    ) -> None:
        self._port = port
        self._bound_port: int | None = None
        self._project = project
        self._token = token if token is not None else secrets.token_hex(16)
        self._machine = {"gpus": gpus, "gpu_name": gpu_name, "gpu_memory": gpu_memory, "price": price}
        self._places = Places(read_regions(regions))
        self._needs_fleet = needs_fleet
        self._paces = {
            "step": step_seconds,
            "stop_grace": stop_grace_seconds,
            "retry_delay": retry_seconds,
            "instance": instance_seconds,
        }
        self._metrics_seconds = metrics_seconds
        self._gpu_usage = gpu_usage
        self._faults = Faults()
        self._scenarios = Scenarios(self._faults, self._places)
        self._thread: threading.Thread | None = None
        self._middleware: FaultMiddleware | None = None
        self._uvicorn: ReadyServer | None = None
        self._directory: Path | None = None
        self._seen: State | None = None

    def __repr__(self) -> str:
        where = "not started" if self._bound_port is None else self.url
        return f"LocalServer({where}, project={self._project!r})"

    @property
    def url(self) -> str:
        """Return the base URL; raises RuntimeError if the server is not started."""
        if self._bound_port is None:
            raise RuntimeError("The server is not started. Call start(), or use it as a context manager.")
        return f"http://{_ADDRESS}:{self._bound_port}"

    @property
    def project(self) -> str:
        """Return the name of the one project."""
        return self._project

    @property
    def token(self) -> str:
        """Return the token of the one user."""
        return self._token

    @property
    def faults(self) -> Faults:
        """Return the injected faults; `Faults.add` adds one."""
        return self._faults

    @property
    def scenarios(self) -> Scenarios:
        """Return what happens to the next runs; its methods add to it."""
        return self._scenarios

    @property
    def runs(self) -> list[SeenRun]:
        """Return the runs received since the start as they are now, oldest first; also after the end."""
        return [] if self._seen is None else seen_runs(self._seen)

    @property
    def requests(self) -> list[RecordedRequest]:
        """Return the requests received since the start, oldest first."""
        return list(self._middleware.requests) if self._middleware is not None else []

    @property
    def directory(self) -> Path | None:
        """Return the temporary directory while the server runs, else None."""
        return self._directory

    def client(self) -> Client:
        """Return a new client of this server."""
        from dstack_core.client import Client

        return Client(server_url=self.url, project_name=self.project, user_token=self.token)

    def start(self) -> Self:
        """Start serving and return once requests are answered.

        Raises ImportError if the extra `local` is not installed or on Windows, OSError if the port is taken,
        ValueError if it is not one, RuntimeError if the server is already started.
        """
        if self._thread is not None:
            raise RuntimeError("The server is already started.")
        _require_extra()
        listener = _listen(self._port)
        self._bound_port = listener.getsockname()[1]
        self._directory = Path(tempfile.mkdtemp(prefix="dstack-local-"))
        ready = threading.Event()
        failure: list[BaseException] = []
        self._thread = threading.Thread(
            target=self._serve, args=(listener, ready, failure), name="dstack-local-server", daemon=True
        )
        self._thread.start()
        atexit.register(self.stop)
        ready.wait()
        if failure:
            self.stop()
            raise failure[0]
        return self

    def stop(self) -> None:
        """Kill every job, stop serving and remove all traces; does nothing if the server is not started."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        atexit.unregister(self.stop)
        if self._uvicorn is not None:
            self._uvicorn.stop()
        thread.join(_STOP_SECONDS)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._bound_port = self._directory = self._uvicorn = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _serve(self, listener: socket.socket, ready: threading.Event, failure: list[BaseException]) -> None:
        try:
            with listener:
                asyncio.run(self._run(listener, ready))
        except BaseException as error:
            failure.append(error)
        finally:
            ready.set()

    async def _run(self, listener: socket.socket, ready: threading.Event) -> None:
        from dstack_core.local.app import build_app
        from dstack_core.local.fault_middleware import FaultMiddleware
        from dstack_core.local.loop import QuietConfig, ReadyServer

        state = self._seen = self._state()
        self._middleware = middleware = FaultMiddleware(build_app(state), self._faults, self._hang_up)

        async def end() -> None:
            middleware.close()
            await state.close()

        self._uvicorn = ReadyServer(QuietConfig(middleware), ready.set, end)
        try:
            await self._uvicorn.serve(sockets=[listener])
        finally:
            await end()

    def _state(self) -> State:
        from dstack_core.local.inventory import Inventory
        from dstack_core.local.jobs import Pace
        from dstack_core.local.state import Settings, State

        assert self._directory is not None  # noqa: S101 - made by start()
        inventory: Any = self._machine
        settings = Settings(
            self._project,
            self._token,
            Inventory(**inventory, offered=self._places),
            Pace(**self._paces),
            self._metrics_seconds,
            self._gpu_usage,
            self._needs_fleet,
        )
        return State(settings, self._directory, self._scenarios)

    def _hang_up(self, client: tuple[str, int]) -> None:
        if self._uvicorn is not None:
            for connection in list(self._uvicorn.server_state.connections):
                if getattr(connection, "client", None) == tuple(client):
                    connection.transport.abort()


def _require_extra() -> None:
    try:
        import fcntl  # noqa: F401
        import pty  # noqa: F401
        import termios  # noqa: F401
    except ImportError as error:
        raise ImportError(_NO_POSIX.format(module=error.name)) from None
    try:
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(_MISSING) from error


def _listen(port: int) -> socket.socket:
    # With an explicit protocol, asyncio turns off Nagle's algorithm, which saves 40 ms per reply.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_ADDRESS, port))
        # Listen at once, so that a client that connects early waits instead of being refused. 128 clients may
        # wait, more than a test starts at the same time.
        listener.listen(128)
    except BaseException as error:
        listener.close()
        if isinstance(error, OverflowError):
            raise ValueError(f"port: expected 0 to 65535, got {port}.") from None
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise OSError(errno.EADDRINUSE, f"Port {port} of {_ADDRESS} is already in use") from error
        raise
    return listener
