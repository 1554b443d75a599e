"""Why Airflow ends the process of a task: found by facts, since the signal is always the same.

The supervisor of a task process sends SIGTERM when a user ended the task (its heartbeat was refused), when
the worker shuts down, when three heartbeats failed because Airflow itself is away, and when the scheduler
gave the task to a new try, as one does that takes the tasks of a lost scheduler for orphans (LocalExecutor).
Only in the first case is the task's run to be stopped. Two questions find out, each in a thread of its own:

* the health of Airflow, by a direct request of the task process. A refused connection takes milliseconds.
* the state of the task, through the supervisor; its answer decides. The supervisor repeats a question that
  Airflow does not answer, five times with growing pauses: it takes 10 to 30 seconds to fail. Before
  Airflow 3.3, a supervisor that gets no connection even breaks at it, and leaves the task's process behind
  waiting for the answer for good. So health comes first, and without a connection the state is not asked.

============================================  ====================================  ==============
state of the task                             health of Airflow                     reason
============================================  ====================================  ==============
not asked                                     connection refused twice in 0.2 s     unreachable
failed, success, restarting, removed, ...     any other                             ended
running                                       any other                             worker_leaving
deferred                                      any other                             deferred
None, scheduled, queued, up_for_retry         any other                             replaced
Airflow or the supervisor fails to answer     any other                             unreachable
no answer within 0.5 s                        5xx, or the database is unhealthy     unreachable
no answer within 2 s                          Airflow answers                       ended
no answer within 3 s                          no answer, or no answer of Airflow    unreachable
============================================  ====================================  ==============

A user who ends a task needs a living API server, so an Airflow that cannot be asked speaks for an outage.
Where Airflow is alive and slow, a user is likelier: the supervisor got an answer to its last heartbeat.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Literal

from airflow_provider_dstack._compat import AirflowRuntimeError, conf
from airflow_provider_dstack._threads import start_thread

# Seconds since the start. Airflow leaves 5 s between SIGTERM and SIGKILL, and the stop comes after this.
# The state is asked as soon as there is a connection, or after the first of them: a busy Airflow needs more
# than that for its health, and the slower its answers, the earlier they have to be asked for.
_HEALTH_FIRST_SECONDS = 0.4
# What a healthy supervisor needs for the state, where the health check alone fails: 10 ms, a busy one more.
_STATE_SECONDS = {"failing": 0.5, "up": 2.0}
_SECONDS = 3.0
# A server that is one of several may refuse a connection while it is replaced. Without the second request,
# such a moment counts as an outage, and a run is kept although a user ended its task.
_REFUSED_TWICE_SECONDS = 0.2

_KINDS: dict[str | None, Literal["worker_leaving", "deferred", "replaced"]] = {
    "running": "worker_leaving",
    "deferred": "deferred",
    None: "replaced",
    "scheduled": "replaced",
    "queued": "replaced",
    "up_for_retry": "replaced",
}


@dataclass(frozen=True, slots=True)
class KillReason:
    """A reason why the task's process was ended, and the fact that it was derived from."""

    kind: Literal["ended", "worker_leaving", "deferred", "replaced", "unreachable"]
    fact: str

    def why_kept(self, *, durable: bool, next_try: bool) -> str | None:
        """Return in words why the run is kept and who ends it, None when it is to be stopped.

        Args:
            durable: Whether a next try takes over the run of this one.
            next_try: Whether Airflow will try the task again.
        """
        if self.kind == "deferred":
            return "the task waits for it in the triggerer"
        takes_over = durable and (next_try or self.kind == "replaced")
        if self.kind != "ended" and takes_over:
            causes = {
                "worker_leaving": "the worker is going away",
                "replaced": f"Airflow has given the task to a new try ({self.fact})",
                "unreachable": f"Airflow cannot be reached ({self.fact})",
            }
            return f"{causes[self.kind]}, and it is kept for the task's next try"
        # A next try of a task that is not durable would submit a second run beside this one.
        if self.kind == "unreachable" and not next_try:
            return (
                f"Airflow cannot be reached ({self.fact}), so no user has ended the task; it is kept "
                "although this was the last try, and ends by itself, at its max_duration, or when a "
                "DstackReapOperator finds it"
            )
        return None


@dataclass(frozen=True, slots=True)
class Health:
    """What a direct request showed of Airflow, and the fact that shows it."""

    kind: Literal["up", "failing", "no_connection", "unknown"]
    fact: str


_NO_DATABASE = Health("failing", "its database is unhealthy")


def kill_reason(
    ask_state: Callable[[], str | None], ask_health: Callable[[], Health] | None = None
) -> KillReason:
    """Return why the task's process is ended; takes at most 3 seconds, for helper threads only.

    Args:
        ask_state: Returns the state of the task by asking Airflow; may raise, and may block for minutes.
        ask_health: Returns the health of Airflow; ``airflow_health`` when None.
    """
    answers: SimpleQueue[KillReason | Health | str] = SimpleQueue()
    started = time.monotonic()

    def answer_until(seconds: float) -> KillReason | Health | str | None:
        with suppress(Empty):
            return answers.get(timeout=max(0.0, started + seconds - time.monotonic()))
        return None

    health, no_state = Health("unknown", "no answer within 3 s"), "the state of the task is unknown"
    try:
        start_thread(lambda: answers.put(_health(ask_health or airflow_health)), "dstack-airflow-health")
        first = answer_until(_HEALTH_FIRST_SECONDS)
        if isinstance(first, Health):
            health = first
            if health.kind == "no_connection":
                return KillReason("unreachable", health.fact)
        start_thread(lambda: answers.put(_by_state(ask_state)), "dstack-task-state")
    except RuntimeError as error:
        return KillReason("unreachable", f"no thread can be started: {error}")
    while answer := answer_until(_STATE_SECONDS.get(health.kind, _SECONDS)):
        if isinstance(answer, KillReason):
            return answer
        if isinstance(answer, Health):
            health = answer
        else:
            no_state = answer
    if health.kind == "up":
        return KillReason("ended", f"{no_state}, and {health.fact}")
    return KillReason("unreachable", health.fact)


def airflow_health() -> Health:
    """Ask the API server that the supervisor uses for its health; sends no token.

    Source: Airflow documentation, "Checking Airflow Health Status"; an API server that runs with
    ``--apps execution`` has the health of the execution API alone, which shows nothing of the database.
    """
    base_url = _setting("api", "base_url") or "/"
    if base_url.startswith("/"):
        base_url = f"http://localhost:8080{base_url}"
    base_url = base_url.rstrip("/")
    execution_url = (_setting("core", "execution_api_server_url") or f"{base_url}/execution").rstrip("/")
    root = execution_url.removesuffix("/execution")
    health = _public_health(root)
    if health.kind == "no_connection":
        time.sleep(_REFUSED_TWICE_SECONDS)
        health = _public_health(root)
    if health.kind == "unknown":
        health = _execution_health(execution_url)
        # The worker may not be able to reach the public server, so nothing else that it shows counts.
        if health.kind == "up" and base_url != root and _public_health(base_url) == _NO_DATABASE:
            return _NO_DATABASE
    return health


def _by_state(ask_state: Callable[[], str | None]) -> KillReason | str:
    try:
        state = ask_state()
    except (AirflowRuntimeError, OSError, EOFError) as error:
        # Airflow's reply to the supervisor was an error, or the supervisor is gone.
        return KillReason("unreachable", f"the question for the task's state failed: {error!r}")
    except Exception as error:
        # An Airflow that has to be asked in another way is not away.
        return f"the task's state cannot be asked: {error!r}"
    return KillReason(_KINDS.get(state, "ended"), f"the task's state is {state}")


def _health(ask_health: Callable[[], Health]) -> Health:
    try:
        return ask_health()
    except Exception as error:
        return Health("unknown", repr(error))


def _public_health(root: str) -> Health:
    health, reply = _get(f"{root}/api/v2/monitor/health")
    database = reply.get("metadatabase") if isinstance(reply, dict) else None
    if not isinstance(database, dict):
        return health
    return Health("up", "it is healthy") if database.get("status") == "healthy" else _NO_DATABASE


def _execution_health(url: str) -> Health:
    health, reply = _get(f"{url}/health")
    is_airflow = isinstance(reply, dict) and reply.get("status") == "healthy"
    return Health("up", "its API server is healthy") if is_airflow else health


def _get(url: str) -> tuple[Health, object]:
    """Return what the status alone shows, and the JSON of a good reply."""
    import requests

    verify = _setting("api", "ssl_ca_file") or _setting("api", "ssl_cert") or True
    try:
        # An ``auth`` that adds nothing keeps requests from sending what a .netrc has for the host.
        reply = requests.get(url, timeout=_SECONDS, verify=verify, auth=lambda request: request)
    except requests.exceptions.SSLError as error:
        # The supervisor may trust more certificates than this request does.
        return Health("unknown", str(error)), None
    except requests.RequestException as error:
        return Health("no_connection", _in_short(error)), None
    if reply.status_code >= 500:
        return Health("failing", f"its API server answered {reply.status_code}"), None
    try:
        return Health("unknown", f"its API server answered {reply.status_code}"), reply.json()
    except ValueError:
        return Health("unknown", f"its API server answered {reply.status_code} and no JSON"), None


def _in_short(error: Exception) -> str:
    """Return the system's words for a failed connection, without what the HTTP library puts around them."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.strerror):
        reason = getattr(cause, "reason", None) or next(iter(cause.args), None)
        cause = reason if isinstance(reason, BaseException) else cause.__context__
    return f"{getattr(cause, 'strerror', None) or type(error).__name__}"


def _setting(section: str, key: str) -> str | None:
    return conf.get(section, key, fallback=None) or None
