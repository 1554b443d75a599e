"""Every operation of a client as a flow, for the sync and the async one alike.

A flow is a generator that yields requests and sleeps; the clients' drivers carry these out. Here the flows
are put together, from the outside in: a time limit, then retries, then the check of the server's version,
then the operation itself. Input is checked, and files are read, when a method is called and not when its flow
starts, so that a wrong argument is reported before anything is sent.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dstack_core._attach.attachment import Attachment
from dstack_core._attach.extra import require_packages
from dstack_core._attach.follow_live_log import live_chunks
from dstack_core._attach.keys import LoginKeys, has_own_key, read_identity_file
from dstack_core._attach.ports import verify_ports as verify_local_ports
from dstack_core._attach.wait import attach
from dstack_core._code.deliver import CodeSource
from dstack_core._flow import queries
from dstack_core._flow.accepted_stops import Stops
from dstack_core._flow.apply import apply
from dstack_core._flow.cost_limit import with_guard
from dstack_core._flow.default_tags import send_with_tags
from dstack_core._flow.follow import LONGEST_LOG_PAUSE, FollowOptions, follow
from dstack_core._flow.hold import is_held
from dstack_core._flow.no_fleet import with_fleet_hint
from dstack_core._flow.queries import MOST_VALUES, check_limit, list_events
from dstack_core._flow.raw_log import ChunkOptions, read_chunks
from dstack_core._flow.retry import RetryBudget, TimeLimit, retrying, within
from dstack_core._flow.services import wait_until_ready
from dstack_core._flow.steps import Flow, Op, call
from dstack_core._flow.stop import checked_stop, stop
from dstack_core._flow.stop_options import Check, StopOptions, StopTarget, Until
from dstack_core._flow.submit import random_marker, random_run_name, submit
from dstack_core._flow.utilization import read_metrics
from dstack_core._flow.version_check import VersionCheck
from dstack_core._report.delivery import MODULE_PATH, module_upload, reports_of, with_command
from dstack_core._report.hold import held_on_failure
from dstack_core._wire.api import Api
from dstack_core._wire.attach import Approach, Route, fixed_local_ports
from dstack_core._wire.checkpoints import with_checkpoint
from dstack_core._wire.filling import fill_in, refuse_own_variables, takes_args
from dstack_core._wire.runs import RunSnapshot
from dstack_core._wire.spec import check_run_name, run_spec, with_default_tags
from dstack_core._wire.spec_ends import max_seconds, retries_errors
from dstack_core._wire.survival import with_survival
from dstack_core._wire.versions import needs_of
from dstack_core.clock import epoch, monotonic
from dstack_core.configurations import ConfigurationLike, load_configuration, load_profile
from dstack_core.errors import ConfigurationError
from dstack_core.models.account import Project, User
from dstack_core.models.configurations import Configuration, Task
from dstack_core.models.cost_limits import check_max_cost, refuse_update
from dstack_core.models.costs import CostRow
from dstack_core.models.options import (
    SubmitOptions,
    check_choice,
    check_flags,
    check_options,
    check_seconds,
    hold_seconds,
)
from dstack_core.models.outcome import Outcome
from dstack_core.models.plan import Plan
from dstack_core.models.profiles import Profile
from dstack_core.models.progress import Progress
from dstack_core.models.records import EventRecord
from dstack_core.models.reports import ReportLimits
from dstack_core.models.stops import StopResult
from dstack_core.models.utilization import RunMetrics

T = TypeVar("T")
_log = logging.getLogger("dstack_core")


@dataclass(slots=True)
class Operations:
    """The flows of one project of one server; none of them does I/O of its own.

    ``retry_budget`` in seconds. ``keys`` are SSH keys of the caller's that runs are submitted with and logged
    in to; without them the server's count. ``longest_log_pause`` (seconds) is how long a log without news may
    stay unread while its run is followed. ``default_tags`` are those of every run that can have them.
    """

    api: Api
    retry_budget: float
    keys: LoginKeys | None = None
    code: CodeSource = field(default_factory=CodeSource)
    clock: Callable[[], float] = monotonic
    wall_clock: Callable[[], float] = epoch
    longest_log_pause: float = LONGEST_LOG_PAUSE
    default_tags: Mapping[str, str] = field(default_factory=dict)
    _public_key: str | None = field(default=None, repr=False)
    version_check: VersionCheck = field(init=False, repr=False)
    _stops: Stops = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.version_check = VersionCheck(self.api)
        self._stops = Stops(self.clock)

    def submit(
        self,
        configuration: ConfigurationLike,
        run_name: str | None,
        options: SubmitOptions,
        *,
        verify_ports: bool,
        marker: str | None,
        retry_budget: float | None,
        in_place: bool = False,
    ) -> Flow[RunSnapshot]:
        """Check the input and pack code and files now, which blocks; the flow submits.

        With ``in_place`` it updates an active run of that name.
        """
        check_seconds("retry_budget", retry_budget)
        loaded, options = self._prepared(configuration, options, warns=True)
        reports = _reports(loaded, options)
        name = check_run_name(run_name or loaded.name or random_run_name(loaded))
        run_marker = marker or random_marker()
        if options.get("survive") is not None:
            loaded = with_checkpoint(loaded, options["survive"], name, run_marker)
        wanted = planned = run_spec(loaded, options, run_name=name, marker=run_marker)
        shipment = None
        # After the line above, so that a wrong configuration is reported before anything is packed.
        if self.code.given or loaded.files or loaded.repos or reports:
            shipment = self.code.pack(loaded, [(MODULE_PATH, module_upload())] if reports else ())
            if shipment is not None and shipment.code is not None:
                wanted = run_spec(loaded, options, run_name=name, marker=run_marker, code=shipment.code)
        if verify_ports and isinstance(loaded, Task) and loaded.ports:
            # ``run.attach()`` forwards them; without its packages it would fail after the run has cost money.
            otherwise = ", or pass verify_ports=False if you will not attach to the run."
            require_packages("ports", otherwise=otherwise)
            verify_local_ports(fixed_local_ports(loaded))
        budget = self.budget(retry_budget)
        tags = {} if options.get("tags") is False else self.default_tags
        held = hold_seconds(options.get("debug_on_failure")) is not None

        def send(spec: Mapping[str, Any]) -> Op[RunSnapshot]:
            return send_with_tags(partial(send_with, spec), tags, self.version_check)

        def send_with(spec: Mapping[str, Any], tags: Mapping[str, str]) -> Op[RunSnapshot]:
            if in_place:
                return apply(self.api, spec, budget, marker=marker, default_tags=tags)
            spec = with_default_tags(spec, tags)
            # Only this call knows a marker that it generated itself, so no run can carry it yet.
            return submit(self.api, spec, budget, replace_finished=True, look_first=marker is not None)

        uploads = shipment is not None and shipment.is_own
        max_cost = options.get("max_cost")
        if in_place:
            refuse_update(max_cost)

        def steps() -> Op[RunSnapshot]:
            if marker is not None and (uploads or max_cost is not None) and not in_place:
                # A run that exists already needs no upload and no plan. What every run gets costs less than
                # this request.
                found = yield from call(self.api.get_run(name))
                if found is not None and found.marker == marker:
                    return found
            spec = {**wanted, "ssh_key_pub": (yield from self._key(name, held=held))}
            if max_cost is not None:
                spec = yield from with_guard(self.api, spec, planned, check_max_cost(max_cost))
            if shipment is None:
                return (yield from send(spec))
            return (yield from shipment.submit(self.api, self.version_check, spec, send))

        needs = (*needs_of(wanted), *(shipment.needs if shipment else ()))
        guarded = self.version_check.guarding(steps(), needs, ask_first=True)
        return retrying(guarded, budget, Progress(name))

    def init_repo(self) -> Flow[None]:
        """Read the repository now, which blocks; the flow registers it with the server."""
        return self.retried(self.code.init(self.api, self.version_check))

    def plan(
        self, configuration: ConfigurationLike, options: SubmitOptions, *, timeout: float | None = None
    ) -> Flow[Plan]:
        """Check the input now; the flow fetches the offers."""
        check_seconds("timeout", timeout, above=True)
        spec = run_spec(*self._prepared(configuration, options))

        def steps() -> Op[Plan]:
            spec["ssh_key_pub"] = yield from self._key()
            plan = yield from call(self.api.get_plan(spec))
            return (yield from with_fleet_hint(self.api, self.version_check, plan))

        flow = self.retried(steps(), needs_of(spec), ask_first=True)
        if timeout is None:
            return flow
        what = f"{self.api.server_url} returned no offers within {timeout:g} s"
        return within(flow, TimeLimit(timeout, what, "", self.clock))

    def get(
        self,
        run_name: str,
        run_id: str | None = None,
        *,
        retry_budget: float | None = None,
        timeout: float | None = None,
    ) -> Flow[RunSnapshot | None]:
        """Fetch a run, None if there is no such run."""
        check_seconds("retry_budget", retry_budget)
        check_seconds("timeout", timeout, above=True)
        flow = self.version_check.guarding(call(self.api.get_run(run_name, run_id)))
        progress = None if retry_budget is None else Progress(run_name, run_id)
        flow = retrying(flow, self.budget(retry_budget), progress)
        if timeout is None:
            return flow
        what = f"{self.api.server_url} did not return run {run_name} within {timeout:g} s"
        return within(flow, TimeLimit(timeout, what, "", self.clock, last_request=0.0))

    def list_runs(
        self,
        *,
        all: bool,
        limit: int | None = None,
        status: str | Collection[str] | None = None,
        marker_prefix: str | None = None,
    ) -> Flow[list[RunSnapshot]]:
        """List the project's runs."""
        wanted = queries.run_filter(status, marker_prefix)
        if limit is not None:
            check_limit(limit)
        return self.retried(queries.list_runs(self.api, all=all, limit=limit, is_wanted=wanted))

    def delete_run(self, run_name: str) -> Flow[None]:
        """Delete a run that has ended."""
        return self.retried(call(self.api.delete_run(check_run_name(run_name))))

    def stop(
        self, target: StopTarget, abort: bool, until: str, timeout: float | None, check: Check = Check.ALWAYS
    ) -> Flow[StopResult]:
        """Stop a run; raises what prevented it."""
        check_choice("until", until, tuple(each.value for each in Until))
        check_seconds("timeout", timeout, above=True)
        options = StopOptions(self.clock, abort, timeout, check, Until(until))
        flow = checked_stop(self.api, target, options, self._stops)
        # With a time limit the flow retries by itself, until that limit and not for the client's budget.
        return self.retried(flow) if timeout is None else flow

    def stop_by_name(self, run_name: str, abort: bool, until: str, timeout: float | None) -> Flow[StopResult]:
        """Stop whichever run has that name; the stop is the first request."""
        return self.stop(StopTarget(check_run_name(run_name)), abort, until, timeout, Check.NEVER)

    def stop_owned(self, target: StopTarget, options: StopOptions) -> Flow[StopResult]:
        """Stop a run within ``options.timeout``; raises no server error."""

        def steps() -> Op[StopResult]:
            return (yield from stop(self.api, target, options, self._stops)).result

        return steps()

    def follow(
        self,
        progress: Progress,
        *,
        poll_interval: float,
        logs: bool,
        retry_budget: float,
        on_poll: Callable[[RunSnapshot], None] | None = None,
        report_limits: ReportLimits | None = None,
        late_result: bool = False,
        timestamps: bool = False,
        waiting_interval: float | None = None,
        through_hold: bool = False,
        utilization: bool = False,
    ) -> Flow[Outcome]:
        """Follow a run; ``on_poll`` gets the run after each poll.

        With ``late_result`` a result that the log shows late is waited for, with ``through_hold`` the end of
        a run whose container is held after a failure; with ``utilization`` the outcome shows how busy the
        machine was.
        """
        check_flags(timestamps=timestamps, through_hold=through_hold, utilization=utilization)
        check_seconds("waiting_interval", waiting_interval, above=True)
        check_seconds("poll_interval", poll_interval, above=True)
        check_seconds("retry_budget", retry_budget)
        if report_limits is not None and not isinstance(report_limits, ReportLimits):
            raise ConfigurationError(f"report_limits: expected ReportLimits, got {report_limits!r}.")
        options = FollowOptions(
            poll_interval,
            logs,
            self.wall_clock,
            self.longest_log_pause,
            self._stops,
            on_poll,
            report_limits or ReportLimits(),
            late_result,
            timestamps,
            waiting_interval,
            through_hold,
            utilization,
        )
        flow = self.version_check.guarding(follow(self.api, progress, options))
        return retrying(flow, self.budget(retry_budget), progress)

    def is_held(self, run: RunSnapshot) -> Flow[bool]:
        """Read the log of a run with ``debug_on_failure``: whether its container is held."""
        return self.retried(is_held(self.api, run))

    def chunks(self, run_name: str, run_id: str, options: ChunkOptions) -> Flow[None]:
        """Read the raw log."""
        return self.retried(read_chunks(self.api, Progress(run_name, run_id), options, self._stops))

    def wait_until_ready(
        self, run_name: str, run_id: str, *, poll_interval: float, retry_budget: float
    ) -> Flow[str]:
        """Wait for a service's first answer."""
        check_seconds("poll_interval", poll_interval, above=True)
        check_seconds("retry_budget", retry_budget)
        flow = self.version_check.guarding(wait_until_ready(self.api, run_name, run_id, poll_interval))
        return retrying(flow, self.budget(retry_budget))

    def events(self, run_id: str, limit: int | None) -> Flow[list[EventRecord]]:
        """Read what the server recorded of a run."""
        return self.retried(list_events(self.api, run_id, limit), ["events"])

    def metrics(
        self, run: RunSnapshot, *, node: int | None, replica: int | None, limit: int | None
    ) -> Flow[RunMetrics]:
        """Read the metrics of the jobs with that node and replica, None for all."""
        most = MOST_VALUES if limit is None else check_limit(limit)
        return self.retried(read_metrics(self.api, run, node=node, replica=replica, limit=most))

    def costs(
        self,
        by: str | Sequence[str],
        since: datetime | str | int | None,
        until: datetime | str | int | None,
        marker_prefix: str | None,
        tags: Mapping[str, str] | None,
    ) -> Flow[list[CostRow]]:
        """Check the input now; the flow adds up what the project's runs have cost."""
        # Only a caller of it pays for the import.
        from dstack_core._flow.costs import cost_query, read_costs

        now = datetime.fromtimestamp(self.wall_clock(), UTC)
        query = cost_query(by, since, until, now, marker_prefix=marker_prefix, tags=tags)
        return self.retried(read_costs(self.api, query))

    def user(self) -> Flow[User]:
        """Fetch the user whom the token belongs to."""
        return self.retried(call(self.api.get_user()))

    def projects(self) -> Flow[list[Project]]:
        """List the projects that the user sees."""
        return self.retried(call(self.api.list_projects()))

    def project(self, name: str | None = None) -> Flow[Project]:
        """Fetch a project, the client's own without a name."""
        return self.retried(call(self.api.get_project(name or self.api.project)))

    def attach(
        self,
        run_name: str,
        run_id: str,
        *,
        identity_file: str | os.PathLike[str] | None,
        node: int,
        poll_interval: float,
    ) -> Flow[tuple[RunSnapshot, Attachment | None]]:
        """Check the key file now; the flow connects to a run's container."""
        require_packages("attach")
        identity = None if identity_file is None else read_identity_file(identity_file)

        def new(approach: Approach, route: Route) -> Attachment:
            one_job = len(approach.run.jobs) == 1
            return Attachment(route, self.keys or LoginKeys(), one_job=one_job, identity=identity)

        flow = attach(self.api, run_name, run_id, new, node=node, poll_interval=poll_interval)
        return self.retried(flow)

    def live_chunks(
        self, run_name: str, run_id: str, attachment: Attachment, *, poll_interval: float
    ) -> Flow[None]:
        """Read the raw log of an attached run with one job."""
        progress = Progress(run_name, run_id)
        return self.retried(live_chunks(self.api, progress, attachment, node=0, poll_interval=poll_interval))

    def _prepared(
        self, configuration: ConfigurationLike, options: SubmitOptions, *, warns: bool = False
    ) -> tuple[Configuration, SubmitOptions]:
        """Load the configuration and the profile, and fill in what comes from this process."""
        check_options(options)
        profile = options.get("profile")
        if profile is not None and not isinstance(profile, Profile | str):
            raise ConfigurationError(f"profile: expected a name or a Profile, got {profile!r}.")
        if not isinstance(profile, Profile):
            profile = load_profile(profile, self.code.repository.directory or Path.cwd())
        loaded = load_configuration(configuration)
        filled = fill_in(loaded, env=options.get("env"), args=options.get("args"), environ=os.environ)
        if warns and options.get("args") and not takes_args(loaded):
            _log.warning("args: no command has ${{ run.args }}, so the arguments are not used.")
        reports = _reports(filled, options)
        refuse_own_variables(filled.env, reports=reports)
        if options.get("survive") is not None:
            from dstack_core.models.survive import read_survive

            survive = read_survive(options.get("survive"))
            filled = with_survival(filled, survive, has_policy=options.get("retry_policy") is not None)
        if reports:
            filled = with_command(filled)
        debug = options.get("debug_on_failure")
        if debug is not None:
            spec = run_spec(filled, {**options, "profile": profile})
            retries, limit = retries_errors(spec), max_seconds(spec)
            filled = held_on_failure(
                filled, debug, reports=reports, retries_errors=retries, max_seconds=limit
            )
        return filled, {**options, "profile": profile}

    def _key(self, run_name: str | None = None, *, held: bool = False) -> Op[str]:
        if self._public_key is None:
            self._public_key = None if self.keys is None else self.keys.given_public_key
        if self._public_key is None:
            user = yield from call(self.api.get_user_key(run_name))
            if held and not user.public_key and not has_own_key():
                # Such a server keeps no key, so only a key of this machine could enter the container.
                require_packages("debug_on_failure", otherwise=", or use a server from 0.19.33 on.")
            self._public_key = user.public_key or (self.keys or LoginKeys()).own_public_key()
        return self._public_key

    def budget(self, seconds: float | None) -> RetryBudget:
        """Return a retry budget of so many seconds, None for the client's own."""
        return RetryBudget(self.retry_budget if seconds is None else seconds, self.clock)

    def retried(self, flow: Flow[T], needs: Sequence[str] = (), *, ask_first: bool = False) -> Flow[T]:
        """Return the flow with retries for the client's budget and the check of the server's version."""
        return retrying(self.version_check.guarding(flow, needs, ask_first=ask_first), self.budget(None))


def _reports(configuration: Configuration, options: SubmitOptions) -> bool:
    # A plain submit passes by the room of reports.
    option = options.get("reports")
    return option is not None and reports_of(configuration, option)
