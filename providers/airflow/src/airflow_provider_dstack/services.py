"""Start a service for the tasks of a DAG, and stop it when they are done: for setup and teardown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from airflow_provider_dstack._compat import BaseOperator
from airflow_provider_dstack._parameters import at_least, one_of, refuse_result, yes_or_no
from airflow_provider_dstack._runs_of_tasks import is_of, names_in, names_of_task
from airflow_provider_dstack._stop import stop_seconds
from airflow_provider_dstack.errors import DstackError, DstackRunFailed, DstackRunInterrupted
from airflow_provider_dstack.links import (
    OUTCOME_KEY,
    RUN_LINKS,
    RUN_NAME_KEY,
    SERVICE_LINK_KEY,
    SERVICE_URL_KEY,
    DstackServiceLink,
    push,
)
from airflow_provider_dstack.operators import DstackRunOperator

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import Context
    from airflow_provider_dstack._submission import OnActive
    from airflow_provider_dstack._task_run import TaskRun
    from airflow_provider_dstack.hooks import DstackHook
    from airflow_provider_dstack.triggers import DstackRunTrigger
    from dstack_core import Client, Run


class DstackServiceOperator(DstackRunOperator):
    """An operator that submits a service and waits until it answers; the service keeps running.

    A task that is killed, fails or times out before the service answers stops it. A retried task takes over
    the service of the previous try, a cleared one replaces it. After success the service keeps
    running until ``DstackStopRunOperator`` stops it, or its ``max_duration`` passes. The log of the service
    is relayed until it answers. The address is also the task's XCom ``dstack_service_url``, the name of the
    run ``dstack_run_name``. Unless the service has ``auth: false``, requests need the header ``Authorization:
    Bearer TOKEN``.

    Args:
        deferrable: Give the worker's slot back until the service answers. Its readiness is polled on its own,
            by one request an interval. Default: Airflow's setting ``[operators] default_deferrable``.
        on_active: What happens to an active run called ``run_name``: ``"fail"`` (default) fails the task;
            ``"replace"`` stops it and submits a new one; ``"update"`` updates it in place, as ``runs.apply``
            of ``dstack_core`` does, and leaves it running however the task ends.
        **kwargs: As for ``DstackRunOperator`` except ``returns``, ``fallbacks`` and ``fallback_on_exit``;
            ``configuration`` is that of a service.

    Returns:
        The address of the service (str).

    Raises:
        ValueError: A parameter is wrong; the DAG cannot be parsed.
        DstackRunFailed: The service ended before it answered.
        DstackError: Otherwise, one of ``airflow_provider_dstack.errors``, as for ``DstackRunOperator``.

    Example:
        ``DstackServiceOperator(task_id="serve", configuration="serve.dstack.yml").as_setup()``
    """

    operator_extra_links = (*RUN_LINKS, DstackServiceLink())
    ui_color = "#d9f2e6"

    def __init__(self, *, on_active: OnActive = "fail", **kwargs: Any) -> None:
        refuse_result(kwargs, "A service reports no result.")
        for name in ("fallbacks", "fallback_on_exit"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name}: expected None for a service, got {kwargs[name]!r}. Use DstackRunOperator for "
                    "what falls back to other machines."
                )
        super().__init__(**kwargs)
        self.on_active = one_of("on_active", on_active, ("update", "replace", "fail"))
        if on_active != "fail" and not self.run_name:
            raise ValueError(
                f"on_active={on_active!r}: expected a run_name, got none. Without one each try has a name of "
                "its own, and no service of that name is active."
            )
        self._service_url: str | None = None

    def execute(self, context: Context) -> str:
        """Return the service's address once it answers."""
        ended = super().execute(context)
        if self._service_url is None:
            self._fail(context, ended)
        return self._service_url

    def execute_complete(self, context: Context, event: Mapping[str, Any]) -> str:
        """Return the address of the service that the trigger saw answer, or raise what it reported."""
        from airflow_provider_dstack.service_trigger import READY

        if event["kind"] != READY:
            self._fail(context, super().execute_complete(context, event))
        from airflow_provider_dstack._resumed_log import relay_what_was_shown
        from airflow_provider_dstack._trigger_relay import forget

        relay_what_was_shown(self, event, lambda: self._killed)
        with suppress(Exception):
            forget(context["ti"])
        url: str = event["service_url"]
        self._note_answer(context, event["run_name"], url, event["link"])
        if self._killed:
            self._stop_leftover(context)
            raise DstackRunInterrupted(f"The task was ended while run {event['run_name']} began to answer.")
        return url

    def readiness(self, context: Context) -> Callable[[Run], bool]:
        """Return the check whether the service answers; it pushes the address when it does."""

        def is_ready(run: Run) -> bool:
            url = _answering(run)
            if url is None:
                return False
            self._note_answer(context, run.name, url, run.browser_service_url or url)
            self._service_url = url
            return True

        return is_ready

    def trigger_type(self) -> type[DstackRunTrigger]:
        """Return the class of the trigger that waits until the service answers."""
        from airflow_provider_dstack.service_trigger import DstackServiceTrigger

        return DstackServiceTrigger

    def _note_answer(self, context: Context, run_name: str, url: str, link: str) -> None:
        self.log.info("Service %s answers at %s", run_name, link)
        push(context["ti"], SERVICE_URL_KEY, url, self.log)
        push(context["ti"], SERVICE_LINK_KEY, link, self.log)

    def _fail(self, context: Context, ended: dict[str, Any]) -> NoReturn:
        """Fail the task of a service that ended well, and before it answered."""
        text = f"Service {ended['run_name']} {ended['message']} before it answered. See {ended['url']}"
        push(context["ti"], OUTCOME_KEY, ended, self.log)
        raise DstackRunFailed(text, ended)

    def _hand_over(self, task_run: TaskRun, context: Context) -> None:
        """Leave a service that answers running; have the triggerer wait for one that does not yet."""
        if self._service_url is None:
            super()._hand_over(task_run, context)
        if self._killed:
            raise DstackRunInterrupted(f"The task was ended while run {task_run.ref.name} began to answer.")


class DstackStopRunOperator(BaseOperator):
    """An operator that stops runs and waits for their end; meant for ``as_teardown``.

    A run that has ended, or never existed, is not an error. Exactly one of ``run_name`` and ``runs_of`` is
    given.

    Args:
        run_name: Names of runs (str or list; an empty name is skipped), or what ``DstackRunOperator``
            returned. Default: none.
        runs_of: A task of the same DAG run (its operator or its task id, or several), whose runs are stopped
            whichever try submitted them; in a mapped task group, those of the same map index. Default: none.
        abort: Kill the processes without a grace period. Default False.
        wait_for_completion: Wait until the runs have ended; ``execution_timeout`` is the limit. Default True.
        poll_interval: Seconds between two status requests. Default 5.
        retry_budget: Seconds to keep retrying an unreachable server. Default 600.
        dstack_conn_id: The connection of type ``dstack``. Default ``dstack_default``.
        project_name: Replaces the connection's project. Default: the connection's.
        **kwargs: As for Airflow's ``BaseOperator``.

    Returns:
        A dict: the status of each run that it stopped, by name.

    Raises:
        AirflowFailException: The connection is wrong.
        DstackServerUnreachable: The server did not answer within ``retry_budget``.
        DstackError: A run could not be stopped.

    Example:
        ``DstackStopRunOperator(task_id="stop", runs_of="serve").as_teardown(setups=serve)``
    """

    template_fields: Sequence[str] = ("run_name", "runs_of", "dstack_conn_id", "project_name")
    ui_color = "#ffe4e1"

    def __init__(
        self,
        *,
        run_name: str | Mapping[str, Any] | Iterable[Any] | None = None,
        runs_of: BaseOperator | str | Sequence[BaseOperator | str] | None = None,
        abort: bool = False,
        wait_for_completion: bool = True,
        poll_interval: float = 5.0,
        retry_budget: float = 600.0,
        dstack_conn_id: str = "dstack_default",
        project_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (run_name is None) == (runs_of is None):
            got = "neither" if run_name is None else "both"
            raise ValueError(
                f"DstackStopRunOperator: expected runs_of (tasks) or run_name (names), got {got}."
            )
        self.run_name = run_name
        self.runs_of = [runs_of] if isinstance(runs_of, str | BaseOperator) else runs_of
        if self.runs_of is not None:
            # A task knows its id, a DAG file needs no more of it.
            self.runs_of = [getattr(task, "task_id", task) for task in self.runs_of]
        self.abort = yes_or_no("abort", abort)
        self.wait_for_completion = yes_or_no("wait_for_completion", wait_for_completion)
        self.poll_interval = at_least("poll_interval", poll_interval, 0.1)
        self.retry_budget = at_least("retry_budget", retry_budget, 0.0)
        self.dstack_conn_id = dstack_conn_id
        self.project_name = project_name

    def execute(self, context: Context) -> dict[str, str]:
        """Stop the runs and return how they ended."""
        from airflow_provider_dstack._outcome import as_airflow_error
        from dstack_core import DstackError as CoreError

        try:
            with self.hook().client(retry_budget=self.retry_budget) as client:
                runs = self._runs(client, context)
                for run in runs:
                    self._stop(client, run)
                return {run.name: self._end(run) for run in runs}
        except CoreError as error:
            raise as_airflow_error(error, submitted=False) from error

    def hook(self) -> DstackHook:
        """Return the hook of this operator's connection and project."""
        from airflow_provider_dstack.hooks import DstackHook

        return DstackHook(self.dstack_conn_id, self.project_name)

    def _runs(self, client: Client, context: Context) -> list[Run]:
        if self.runs_of is None:
            found = {name: client.runs.get(name) for name in names_in(self.run_name)}
            for name, run in found.items():
                if run is None:
                    self.log.info("There is no run %s in project %s.", name, client.project)
            return [run for run in found.values() if run is not None]
        names = [names_of_task(str(task_id), context) for task_id in self.runs_of]
        # Clearing a DAG run gives it another start, from which markers are drawn; its XComs stay.
        pushed = set(
            names_in(context["ti"].xcom_pull(task_ids=[str(one) for one in self.runs_of], key=RUN_NAME_KEY))
        )
        runs = [
            run
            for run in client.runs.list()
            if run.outcome() is None and any(is_of(run, one, pushed, context) for one in names)
        ]
        if not runs:
            self.log.info("No run of %s is running.", ", ".join(map(str, self.runs_of)))
        return runs

    def _stop(self, client: Client, run: Run) -> None:
        """Stop one run. Raises what a server that took no stop does."""
        from airflow_provider_dstack._names import run_ref
        from dstack_core.integration import describe_stop, stop_run

        outcome = run.outcome()
        if outcome is not None:
            self.log.info("Run %s has ended already: %s.", run.name, outcome.status)
            return
        result = stop_run(
            client,
            run_ref(run.name, run.marker or ""),
            run_id=run.id,
            timeout=max(self.retry_budget, stop_seconds(client)),
            submitted=True,
            abort=self.abort,
            log=self.log,
        )
        if not result.is_safe:
            raise DstackError(describe_stop(result))

    def _end(self, run: Run) -> str:
        """Return the last known status of a run, which is that of its end when that is waited for."""
        from dstack_core import RunNotFoundError
        from dstack_core.integration import describe_outcome

        try:
            if self.wait_for_completion:
                # Following repeats a stop that the server dropped.
                for _ in run.follow(
                    poll_interval=self.poll_interval,
                    logs=False,
                    retry_budget=self.retry_budget,
                    waiting_interval=None,
                ):
                    continue
            outcome = run.refresh().outcome()
        except RunNotFoundError:
            return "deleted"
        if outcome is None:
            return str(run.last_status)
        self.log.info("%s", describe_outcome(outcome))
        return str(outcome.status)


def _answering(run: Run) -> str | None:
    """Return the service's address if it answers within seconds; the follower reports how its run does."""
    from dstack_core import RunError, RunNotFoundError, ServerUnreachableError, WaitTimeoutError

    try:
        return run.wait_until_ready(timeout=0.0, retry_budget=0.0)
    except (RunError, RunNotFoundError, ServerUnreachableError, WaitTimeoutError):
        return None
