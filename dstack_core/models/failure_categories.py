"""The one table of why runs fail: a stable name for each cause, with a next step.

The problem: dstack servers report why a run ended in five places: the reason of the run, the reason of a job,
its message, its exit status, and the errors of the offers that were tried. The words differ between servers:
dstack 0.18.44 ends an inactive run as ``terminated_by_server`` and a passed ``max_duration`` as
``container_exited_with_error``, with the cause in the message alone. A retry policy, an alert or a report
needs one word that stays the same.

The idea: ``FAILURE_CATEGORIES`` is data. A row has a name (``group.detail``), the kind of error, a cause and
a next step, and the signs by which it is recognized. ``find_category`` takes the first row with a sign that
matches: signs with a text or an exit status come first, since they are more specific than a bare reason.

Invariants:

* Every reason of every server from 0.18.44 to 0.22.5 has exactly one row (a test compares the table with the
  enums of the real servers and with all recorded replies).
* A text is only compared under the reasons with which servers send it, and from its beginning: the message
  of ``container_exited_with_error`` may be the last log lines of a container, which are the user's.
* The set is open. A reason without a row gives ``unknown``, and the server's word stays in
  ``Outcome.reason``.
* Names are never reused for something else; more may be added.

Where the texts come from: the server's background tasks for the reasons and their messages, the runner's
``executor.go``, ``repo.go`` and ``manager.go`` for the code, the shim's ``docker.go`` for images and
containers, Docker's own errors behind those. Exit statuses above 128 are a shell's: 128 plus the signal. -1
is the runner's for a command that a signal killed, whichever it was (Go, ``os.ProcessState.ExitCode``;
PROTOCOL 1.5); it happens where the command replaced its shell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from dstack_core.errors import ConfigurationError, DstackError, ServerUnreachableError

_EXITED = ("container_exited_with_error",)
_CONTAINER = ("creating_container_error",)
_RUNNER = ("executor_error",)
_SERVER = ("terminated_by_server",)
_NO_CAPACITY = ("failed_to_start_due_to_no_capacity",)
_INTERRUPTED = ("interrupted_by_no_capacity",)

UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Sign:
    """What a server sends for a category: one of the reasons, and if given the text and the exit status.

    Attributes:
        reasons: The termination reasons of a run or job.
        text: A regular expression that the beginning of the message matches; None for any message.
        exits: The exit statuses; empty for any.
        on_demand: Whether the machine must be known not to be a spot machine.
    """

    reasons: tuple[str, ...]
    text: str | None = None
    exits: tuple[int, ...] = ()
    on_demand: bool = False

    @property
    def is_specific(self) -> bool:
        """Whether more than the reason must match."""
        return self.text is not None or bool(self.exits) or self.on_demand

    def matches(self, reason: str, exit_status: int | None, text: str, spot: bool | None) -> bool:
        """Return whether a server's words are this sign."""
        return (
            reason in self.reasons
            and (not self.exits or exit_status in self.exits)
            and (self.text is None or re.match(self.text, text, re.IGNORECASE | re.DOTALL) is not None)
            and not (self.on_demand and spot is not False)
        )


@dataclass(frozen=True, slots=True)
class FailureCategory:
    """A cause of failed runs.

    Attributes:
        name: Its stable name, such as ``user.out_of_memory``; the part before the dot is its group.
        kind: What the error is to a caller: ``user``, ``capacity``, ``interruption``, ``limit``,
            ``infrastructure``, ``stopped`` or ``unknown``.
        cause: One sentence for a person.
        next_step: One sentence on what to do.
        clause: What the message of an outcome adds to the exit status (str), or empty.
        signs: How the category is recognized; empty for one that only callers set.
    """

    name: str
    kind: str
    cause: str
    next_step: str
    clause: str = ""
    signs: tuple[Sign, ...] = field(default=(), repr=False)

    @property
    def group(self) -> str:
        """The part of the name before the dot."""
        return self.name.partition(".")[0]


def _row(name: str, kind: str, cause: str, next_step: str, *signs: Sign, clause: str = "") -> FailureCategory:
    return FailureCategory(name, kind, cause, next_step, clause, signs)


def _code(text: str) -> Sign:
    # The runner reports it as an exit of the container (runner, executor.go).
    return Sign(_EXITED, rf"Failed to set up the repo \(.*(?:{text})")


def _pull(text: str) -> Sign:
    return Sign(_CONTAINER, rf"pullImage error: .*(?:{text})")


def _create(text: str) -> Sign:
    return Sign(_CONTAINER, rf"createContainer error: .*(?:{text})")


FAILURE_CATEGORIES = (
    # -- The code of the run. It comes before the command's exit, whose reason it shares.
    _row(
        "code.diff_failed",
        "user",
        "The uncommitted changes could not be applied to the clone of the repository.",
        "Commit and push the changes, or submit the directory with files instead of a repository.",
        _code("diff|patch|conflict"),
    ),
    _row(
        "code.clone_failed",
        "user",
        "The repository could not be cloned on the machine.",
        "Check its URL, the branch or commit, and the Git credentials of the run.",
        _code(
            "clone|checkout|branch reference|authentication|authorization|repository not found"
            "|reference not found|private key|remote repo|resolve host|manager\\.go"
        ),
    ),
    _row(
        "code.setup_failed",
        "user",
        "The code or the files of the run could not be put in place.",
        "Check the paths of repos and files, and that working_dir may be written.",
        Sign(_EXITED, r"Failed to set up the repo"),
        Sign(_RUNNER, r"Failed to set up files"),
    ),
    # -- The command of the run.
    _row(
        "user.out_of_memory",
        "user",
        "The command was killed (SIGKILL), most likely because it ran out of memory.",
        "Ask for more memory in resources, or let the command use less, such as with smaller batches.",
        Sign(_EXITED, exits=(137,)),
        clause="killed, most likely out of memory",
    ),
    _row(
        "user.killed",
        "user",
        "The command was killed by a signal, most likely because it ran out of memory.",
        "Read the last log lines; if they explain nothing, ask for more memory in resources.",
        Sign(_EXITED, exits=(-1, 129, 130, 131, 138, 140, 141, 142)),
        clause="killed by a signal",
    ),
    _row(
        "user.segfault",
        "user",
        "The command accessed memory that it may not access (SIGSEGV).",
        "Check native libraries: their versions, and that they match the GPU driver and CUDA of the machine.",
        Sign(_EXITED, exits=(139,)),
        clause="segmentation fault",
    ),
    _row(
        "user.aborted",
        "user",
        "The command crashed: it aborted itself or ran an illegal instruction.",
        "Read the end of the log for a failed check, and compare the machine's CPU with what the code needs.",
        Sign(_EXITED, exits=(132, 133, 134, 135, 136)),
        clause="crashed",
    ),
    _row(
        "user.terminated",
        "user",
        "A process of the command was ended by SIGTERM, which came from inside the run or its machine.",
        "Check what sends the signal: a launcher such as torchrun ends all workers if one of them fails.",
        Sign(_EXITED, exits=(143,)),
        clause="ended by SIGTERM",
    ),
    _row(
        "user.not_found",
        "user",
        "A command was not found.",
        "Check its spelling, that the image contains it, and that PATH includes its directory.",
        Sign(_EXITED, exits=(127,)),
        clause="command not found",
    ),
    _row(
        "user.not_executable",
        "user",
        "A command was found, but cannot be executed.",
        "Make it executable (chmod +x), and check that it is built for the machine's CPU.",
        Sign(_EXITED, exits=(126,)),
        clause="not executable",
    ),
    _row(
        "limit.max_duration",
        "limit",
        "The run was longer than its max_duration.",
        "Raise max_duration, or save checkpoints so that the next run continues.",
        Sign(("max_duration_exceeded",)),
        # dstack 0.18.44 sends it as an exit of the container.
        Sign(_EXITED, r"Max duration exceeded$"),
    ),
    _row(
        "user.exit",
        "user",
        "The command of the run failed.",
        "Correct the command or its input; the end of the log shows what went wrong.",
        Sign(_EXITED),
    ),
    # -- Capacity.
    _row(
        "capacity.quota",
        "capacity",
        "The cloud account's quota does not allow the machine.",
        "Ask the cloud for a higher quota, or allow other backends, regions or GPUs.",
        Sign(
            _NO_CAPACITY,
            r".*(?:quota|LimitExceeded|limit exceeded|InstanceLimit|exceeds? (?:the |your )?limit)",
        ),
    ),
    _row(
        "capacity.no_fleet",
        "capacity",
        "No fleet of the project can run this.",
        "Create a fleet that matches the resources, or ask for less; `dstack fleet list` shows the fleets.",
        Sign(_NO_CAPACITY, r"No matching fleet found|Failed to use specified fleets"),
    ),
    _row(
        "capacity.fleet_full",
        "capacity",
        "The fleet has no machine to spare: none fits, or those that fit are busy.",
        "Try again later, allow more machines in the fleet, or ask for less in resources.",
        Sign(
            _NO_CAPACITY,
            r"Fleet is at capacity|Could not reuse any instance|Failed to use specified instances",
        ),
    ),
    _row(
        "capacity.none",
        "capacity",
        "No machine could be had.",
        "Try again later, or allow more machines: other GPUs, regions or backends, spot, a higher max_price.",
        Sign(_NO_CAPACITY),
    ),
    # -- The machine.
    _row(
        "machine.outdated",
        "infrastructure",
        "The machine was created by an old dstack server and lacks a function that the run needs.",
        "Delete the machine, so that the server creates a new one.",
        Sign(_INTERRUPTED, r"The selected instance was created before dstack"),
    ),
    _row(
        "machine.lost",
        "infrastructure",
        "The machine could no longer be reached.",
        "Run it again; if the same machine is lost again, remove it from the fleet and read its system log.",
        Sign(("instance_unreachable",)),
        # dstack 0.18.44 has one reason for spot and other machines.
        Sign(_INTERRUPTED, on_demand=True),
    ),
    _row(
        "spot.interrupted",
        "interruption",
        "The cloud took the spot machine away.",
        'Run it again from a checkpoint, or use spot_policy="on-demand".',
        Sign(_INTERRUPTED),
    ),
    _row(
        "machine.access_revoked",
        "infrastructure",
        "The project may no longer use the machine's fleet.",
        "Ask the fleet's owner to share it again, or use another fleet.",
        Sign(("instance_access_revoked",)),
    ),
    _row(
        "machine.start_timeout",
        "infrastructure",
        "The machine or its container did not start in time.",
        "Run it again; if it happens again, use a smaller image or another backend.",
        Sign(("waiting_instance_limit_exceeded", "waiting_runner_limit_exceeded")),
    ),
    # -- The image and the container.
    _row(
        "image.no_space",
        "user",
        "The image does not fit on the machine's disk.",
        "Ask for a larger disk in resources, or use a smaller image.",
        _pull("no space left on device"),
        _create("no space left on device"),
    ),
    _row(
        "image.wrong_platform",
        "user",
        "The image does not exist for the CPU of the machine.",
        "Build the image for that CPU, or ask for another one in resources, such as cpu: x86:4.",
        _pull("no matching manifest|does not match the specified platform"),
    ),
    _row(
        "registry.denied",
        "user",
        "The registry refused to hand out the image, or the image does not exist.",
        "Check the name of the image, and registry_auth: its user, its password and their access.",
        _pull("denied|unauthorized|authentication required|no basic auth|forbidden|\\b40[13]\\b"),
    ),
    _row(
        "image.not_found",
        "user",
        "The registry does not have the image.",
        "Check the image's name and tag.",
        _pull("manifest unknown|not found|does not exist|name unknown|invalid reference format"),
        _create("no such image"),
    ),
    _row(
        "image.pull_failed",
        "infrastructure",
        "The image could not be downloaded.",
        "Run it again; if it fails again, check the registry, its rate limits and the machine's network.",
        Sign(_CONTAINER, r"pullImage error"),
    ),
    _row(
        "ports.busy",
        "infrastructure",
        "A port of the run is taken on its machine.",
        "Use another port, or a machine that runs nothing else.",
        Sign(("ports_binding_failed",)),
        _create("port is already allocated|address already in use"),
    ),
    _row(
        "container.create_failed",
        "infrastructure",
        "Docker could not create the container.",
        "Read the message; it mostly names a driver, a device or an option of the machine that is missing.",
        Sign(_CONTAINER),
    ),
    _row(
        "container.setup_failed",
        "user",
        "The user or the working directory of the run cannot be used in its image.",
        "Check user and working_dir of the configuration.",
        Sign(_RUNNER, r"Failed to set job (?:user|working dir)"),
    ),
    # -- Volumes. dstack 0.18.44 sends their errors as terminated_by_server.
    _row(
        "volume.missing",
        "user",
        "A volume of the run does not exist.",
        "Check its name with `dstack volume list`, or create it.",
        Sign(("volume_error", *_SERVER), r"Volume .+ (?:not found|is marked for deletion)"),
    ),
    _row(
        "volume.error",
        "infrastructure",
        "A volume could not be attached.",
        "Check that it is active, in the region of the machine, and not attached elsewhere.",
        Sign(("volume_error",)),
        Sign(
            _SERVER,
            r"Failed to attach volume|Cannot mount volumes|Cannot attach the same volume"
            r"|Volumes from different|Failed to find an eligible volume",
        ),
        Sign(_RUNNER, r"prepareVolumes error|prepareInstanceMountPoints error"),
    ),
    # -- Limits.
    _row(
        "limit.max_cost",
        "limit",
        "The run was stopped at its cost limit, max_cost.",
        "Raise max_cost, use a cheaper machine, or save checkpoints so that the next run continues.",
        Sign(("max_cost_exceeded",)),
    ),
    _row(
        "limit.idle_gpu",
        "limit",
        "The GPU was used less than utilization_policy demands.",
        "Find out what the GPU waits for, mostly its input, or lower min_gpu_utilization.",
        Sign(("terminated_due_to_utilization_policy",)),
        Sign(_SERVER, r"The job GPU utilization below"),
    ),
    _row(
        "limit.inactivity",
        "limit",
        "No user was connected for longer than inactivity_duration.",
        "Run it again if it is still needed, or raise inactivity_duration.",
        Sign(("inactivity_duration_exceeded",)),
        Sign(_SERVER, r"The job was inactive for"),
    ),
    _row(
        "limit.log_quota",
        "limit",
        "The run wrote more log than the server accepts in an hour.",
        "Log less, such as one line per hundred steps, or write the details to a file.",
        Sign(("log_quota_exceeded",)),
    ),
    _row(
        "limit.retries",
        "limit",
        "The time for dstack's own retries passed.",
        "Raise the duration of the run's retry policy, or remove what makes the attempts fail.",
        Sign(("retry_limit_exceeded",)),
    ),
    # -- Stops.
    _row(
        "stopped.by_user",
        "stopped",
        "A stop was requested.",
        "If it was not you, the run's page and its events show who stopped it.",
        Sign(("stopped_by_user", "terminated_by_user")),
    ),
    _row(
        "stopped.aborted",
        "stopped",
        "An abort was requested, so the command had no time to end by itself.",
        "If it was not you, the run's page and its events show who aborted it.",
        Sign(("aborted_by_user",)),
    ),
    _row(
        "stopped.scaled_down",
        "stopped",
        "The service needs fewer replicas.",
        "Nothing; raise the lower bound of replicas to keep more of them.",
        Sign(("scaled_down",)),
    ),
    # -- The server.
    _row(
        "secret.missing",
        "user",
        "A secret or variable that the configuration refers to does not exist.",
        "Create it with `dstack secret set`, or correct the reference.",
        Sign(_SERVER, r"(?:Secrets|Groups IP) interpolation error"),
    ),
    _row(
        "gateway.error",
        "infrastructure",
        "The gateway of the service failed.",
        "Check the gateway with `dstack gateway list`, then submit the service again.",
        Sign(("gateway_error",)),
    ),
    _row(
        "server.terminated",
        "infrastructure",
        "The dstack server ended the run.",
        "Run it again; if it ends again, ask the server's administrator for its log.",
        Sign(_SERVER),
    ),
    _row(
        "server.internal",
        "infrastructure",
        "The dstack server had an internal error.",
        "Run it again; if it fails again, ask the server's administrator for its log.",
        Sign(("server_error",)),
    ),
    _row(
        "server.unreachable",
        "infrastructure",
        "The dstack server did not answer for longer than the retry budget.",
        "Check the server's address and network; the run keeps running meanwhile.",
    ),
    _row(
        "runner.error",
        "infrastructure",
        "The dstack agent on the machine failed.",
        "Run it again, on another machine if the message names the machine's devices or mounts.",
        Sign(_RUNNER),
    ),
    _row(
        UNKNOWN,
        UNKNOWN,
        "The server gives no reason that this version knows.",
        "Read the reason, the message and the last log lines; a newer version may know the reason.",
        # Only where no job of the run has a reason of its own.
        Sign(("job_failed",)),
    ),
)
"""All categories, the more specific of two that share a reason first."""

RETRIED_CATEGORIES = ("capacity", "spot", "machine", "image.pull_failed", "server", "gateway")
"""What is worth another try: nothing was paid for, or the next machine does better."""

_BY_NAME = {row.name: row for row in FAILURE_CATEGORIES}
_ALL_SIGNS = [(sign, row) for row in FAILURE_CATEGORIES for sign in row.signs]
_SIGNS = sorted(_ALL_SIGNS, key=lambda pair: not pair[0].is_specific)


def find_category(
    reason: str | None, exit_status: int | None = None, text: str = "", *, spot: bool | None = None
) -> FailureCategory:
    """Return the category of a run that did not succeed.

    Args:
        reason: The server's reason, or None.
        exit_status: What the command exited with, or None.
        text: The server's message on the reason; empty without one.
        spot: Whether the machine was a spot machine, None if that is not known.
    """
    text = " ".join(text.split())
    found = (row for sign, row in _SIGNS if sign.matches(reason or "", exit_status, text, spot))
    return next(found, _BY_NAME[UNKNOWN])


def describe_exit(exit_status: int) -> str:
    """Return how a command that failed exited, with what its exit status means."""
    if exit_status == -1:
        # The runner does not report which signal it was.
        return "failed: its command was killed by a signal (most likely out of memory)"
    clause = find_category(_EXITED[0], exit_status).clause
    return f"failed: its command exited with status {exit_status}" + (f" ({clause})" if clause else "")


def category_named(name: str) -> FailureCategory:
    """Return the category of that name; one that only a newer version has keeps its name."""
    unknown = _BY_NAME[UNKNOWN]
    return _BY_NAME.get(name) or FailureCategory(name, UNKNOWN, unknown.cause, unknown.next_step)


def check_categories(categories: Iterable[str], subject: str = "categories") -> tuple[str, ...]:
    """Return names of categories and groups, in the given order.

    Raises:
        ConfigurationError: One of them is neither a category nor a group.
    """
    names = (categories,) if isinstance(categories, str) else tuple(categories)
    groups = dict.fromkeys(row.group for row in FAILURE_CATEGORIES)
    for name in names:
        if name not in groups and name not in _BY_NAME:
            raise ConfigurationError(
                f'{subject}: expected failure categories such as "capacity" or "image.pull_failed", got '
                f"{name!r}. The groups are {', '.join(groups)}."
            )
    return names


def in_categories(category: str, categories: Iterable[str]) -> bool:
    """Return whether a category is one of ``categories``, where ``"capacity"`` stands for its whole group."""
    return any(category == each or category.startswith(f"{each}.") for each in categories)


def category_of(error: BaseException) -> str | None:
    """Return the failure category of an error of this package, None if it has none.

    Example:
        ``category_of(error) == "spot.interrupted"``
    """
    if isinstance(error, ServerUnreachableError):
        return "server.unreachable"
    outcome = getattr(error, "outcome", None) if isinstance(error, DstackError) else None
    category = getattr(outcome, "category", "")
    return str(category) or None
