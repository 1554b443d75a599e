"""The variables of a work pool of type ``dstack``, and the task that is made of them for a flow run.

The problem: a deployment made without a Git remote names a directory (its path, or the pull step
``set_working_directory``), and ``prefect flow-run execute`` changes to that very path, which the machine of
the flow run does not have.

The idea: the directory is uploaded as the code of the run, and a link at its path leads to the code. So
Prefect finds it where the deployment names it, without a change to the deployment.

A flow run of ``@dstack`` has a bundle instead of a deployment. ``carry`` makes it the flow run's upload.

The invariant: only the work pool can allow uploads, since a deployment could otherwise send any file of the
worker's machine to a run.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn
from urllib.parse import urlsplit
from uuid import UUID

from prefect.workers.base import BaseJobConfiguration, BaseVariables
from pydantic import BaseModel, Field, PrivateAttr, SecretStr, field_validator

from prefect_dstack import _bundles
from prefect_dstack._bundles import Parcel
from prefect_dstack._callbacks import check_paths
from prefect_dstack._log_relay import DEFAULT_LOG_BUDGET
from prefect_dstack._names import machine_names
from prefect_dstack._secrets import (
    GitCredentialsLike,
    GitLogin,
    Masking,
    name_or_secret,
    names_of_secrets,
)
from prefect_dstack._submission import Submission, resolve
from prefect_dstack._tags import tags_of_worker
from prefect_dstack.credentials import DstackCredentials

if TYPE_CHECKING:
    from prefect.client.schemas.objects import Flow, FlowRun, WorkPool
    from prefect.client.schemas.responses import DeploymentResponse

    from dstack_core.integration import AttemptNames

# What makes sense only in the worker's process.
_NOT_PASSED_ON = ("PREFECT_HOME", "PREFECT_PROFILES_PATH", "PREFECT_SERVER_", "PREFECT_WORKER_")
# The flow's own log records reach Prefect from the machine, and its console would repeat them. What the flow
# prints must arrive when it is printed.
_DEFAULTS = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL", "PYTHONUNBUFFERED": "1"}
_NO_FALLBACKS = (
    "fallbacks: not used for a flow of @dstack, whose code goes to its first machine alone. Deploy the flow, "
    "or use survive."
)
_SIGTERM, _RESCHEDULE = "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR", "reschedule"
_IMAGE = "What the machine runs in; it must hold Prefect. Without one, Prefect's own image of this version."
_REST = "Further keys of a .dstack.yml, such as fleets, regions, volumes or user."
# The pull step that names a directory of the worker's machine.
_STEP = "set_working_directory"
# The options that a work pool has under the key of a .dstack.yml.
_FIELDS = {"retry_policy": "retry"}

SpotPolicyName = Literal["spot", "on-demand", "auto"]


class MachineFields(BaseModel):
    """The fields that both of the following have: the options of a submission, and the machine's own."""

    credentials: DstackCredentials | str | None = Field(
        default=None,
        description="A dstack credentials block, or the name of one; else the worker's environment is used.",
    )
    image: str | None = Field(default=None, description=_IMAGE)
    resources: dict[str, Any] | str | int | None = Field(
        default=None, description="What the machine must have, such as {gpu: 24GB.., memory: 32GB..}."
    )
    spot_policy: SpotPolicyName | None = Field(
        default=None, description="Whether spot instances are taken; without it on-demand ones are."
    )
    max_price: float | None = Field(default=None, gt=0, description="The highest price, in USD per hour.")
    max_cost: float | None = Field(
        default=None, gt=0, description="The most that the run may cost in all, in USD; it is stopped there."
    )
    max_duration: int | str | None = Field(
        default=None,
        description="When the machine is stopped at the latest: seconds, 2h, or off; 24 h by default.",
    )
    survive: dict[str, Any] | str | int | bool | None = Field(
        default=None,
        description="What the run survives, such as an interruption: 4h in all, or {duration: 4h, times: 5}.",
    )
    debug_on_failure: int | str | None = Field(
        default=None,
        description="How long the container is held after a failure, for a shell in it: seconds or 30m.",
    )
    retry: bool | dict[str, Any] | None = Field(
        default=None, description="When dstack tries again, such as {on_events: [no-capacity], duration: 1h}."
    )
    fallbacks: list[dict[str, Any]] | None = Field(
        default=None,
        description="What the next machines have, if one is lost or not found: [{spot_policy: on-demand}].",
    )
    fallback_on_exit: dict[str, int | Literal["next"]] | None = Field(
        default=None,
        description="Exit statuses of the machine that lead to the next of fallbacks, too: {137: next}.",
    )
    backends: list[str] | None = Field(default=None, description="The only clouds to take machines from.")
    working_dir: str | None = Field(
        default=None, description="Where the command starts, relative to the code's directory, or absolute."
    )
    args: list[str] | None = Field(
        default=None, description="What ${{ run.args }} in the command stands for."
    )
    profile: str | None = Field(
        default=None, description="Name of a profile; without one the file's default profile counts."
    )
    tags: dict[str, str] | bool | None = Field(
        default=None,
        description="Tags of the machine at its cloud, beside the automatic ones; off for no tags at all.",
    )
    profiles_file: str | None = Field(
        default=None,
        description="File of profiles on the worker's machine; else .dstack/profiles.yml in the repo_dir.",
    )
    repo_dir: str | None = Field(
        default=None,
        description="Directory of the worker's machine that the run gets; '.' is the deployment's own.",
    )
    local_repo: bool = Field(
        default=False, description="Whether a Git checkout is uploaded instead of cloned by the run."
    )
    git_credentials: str | dict[str, Any] | None = Field(
        default=None,
        repr=False,
        description="<block type>/<name> of a block with a Git token or key; else those of the credentials.",
    )
    configuration: dict[str, Any] = Field(default_factory=dict, title="dstack keys", description=_REST)
    stream_output: bool = Field(
        default=True, description="Whether what the machine prints is sent to the flow run's log."
    )
    log_budget_bytes: int | None = Field(
        default=DEFAULT_LOG_BUDGET,
        ge=0,
        description="Bytes of the output that are sent at most; empty for all.",
    )
    log_timestamps: bool = Field(
        default=False, description="Whether each line begins with the time at which the server logged it."
    )
    poll_interval: float = Field(default=5.0, gt=0, description="Seconds between two status requests.")
    callbacks: list[str] | None = Field(
        default=None,
        description="Paths of classes that the worker calls while it watches: my_package.alerts.Alerts.",
    )
    mask_env: Literal["secrets", "all", "none"] | list[str] = Field(
        default="secrets",
        description="Which values of env are masked: secrets, all, none, or names beside those of secrets.",
    )

    @field_validator("callbacks")
    @classmethod
    def _callbacks_are_paths(cls, value: list[str] | None) -> list[str] | None:
        return check_paths(value)


class DstackVariables(MachineFields, BaseVariables):
    """The variables of a work pool: what a deployment or a flow run may set about its machine."""


class DstackJobConfiguration(MachineFields, BaseJobConfiguration):
    """The machine of one flow run: the same fields, with the environment and the command that Prefect adds.

    ``uploads`` is not a variable: only a user who may change the work pool can allow deployments to send
    files of the workers' machines to a run.
    """

    uploads: Literal["refused", "allowed"] = Field(
        default="refused", json_schema_extra={"template": "refused"}
    )

    _directory: Path | None = PrivateAttr(default=None)
    _flow_run_id: UUID | None = PrivateAttr(default=None)
    _secret_names: frozenset[str] = PrivateAttr(default=frozenset())
    _has_own_mask: bool = PrivateAttr(default=False)
    _bundle_is: str | None = PrivateAttr(default=None)
    _own_callbacks: list[Any] = PrivateAttr(default_factory=list)
    _bundle: tuple[Parcel, Path] | None = PrivateAttr(default=None)

    def _when_terminated(self, bundle_is: str | None) -> dict[str, str]:
        """Return what becomes of the flow run on a SIGTERM, as of a machine that shuts down.

        If dstack starts the machine again, it stays Running: Prefect would mark it as Crashed, and the worker
        would then stop the new machine. Otherwise it is scheduled again, unless its code is a bundle, which
        goes to the first machine alone. Source: Prefect, ``prefect flow-run execute``; versions without a
        value ignore it.
        """
        retry = self.configuration.get("retry") if self.retry is None else self.retry
        if _has_interruption(retry, "on_events") or _has_interruption(self.survive, "events"):
            return {_SIGTERM: "relinquish"}
        return {_SIGTERM: _RESCHEDULE} if bundle_is is None else {}

    def prepare_for_flow_run(
        self,
        flow_run: FlowRun,
        deployment: DeploymentResponse | None = None,
        flow: Flow | None = None,
        work_pool: WorkPool | None = None,
        worker_name: str | None = None,
        worker_id: UUID | None = None,
    ) -> None:
        """Add what the flow run needs; the parameters come from Prefect."""
        # What the work pool or deployment sets is passed on, even if the worker has a value of its own.
        chosen = dict(self.env)
        super().prepare_for_flow_run(flow_run, deployment, flow, work_pool, worker_name, worker_id)
        self._bundle_is = (flow_run.job_variables or {}).get(_bundles.VARIABLE)
        self.env = {
            name: value
            for name, value in {**_DEFAULTS, **self._when_terminated(self._bundle_is), **self.env}.items()
            if name in chosen or not name.startswith(_NOT_PASSED_ON)
        }
        # Here the values are texts; their templates are those of the pool, the deployment and the flow run.
        template = {} if work_pool is None else work_pool.base_job_template
        properties = (template.get("variables") or {}).get("properties") or {}
        own = [getattr(deployment, "job_variables", None) or {}, flow_run.job_variables or {}]
        given = [
            (properties.get("env") or {}).get("default"),
            (template.get("job_configuration") or {}).get("env"),
            *(variables.get("env") for variables in own),
        ]
        self._has_own_mask = any("mask_env" in variables for variables in own)
        self._secret_names = frozenset().union(*map(names_of_secrets, given))
        self._directory = directory_of(deployment)
        self._flow_run_id = flow_run.id

    @property
    def bundle_is(self) -> str | None:
        """Where the flow run's bundle is; None for a flow run of a deployment."""
        return self._bundle_is

    @property
    def is_rescheduled(self) -> bool:
        """Whether the flow run is scheduled again when its machine is interrupted."""
        return self.env.get(_SIGTERM) == _RESCHEDULE

    @property
    def ladder(self) -> dict[str, Any] | None:
        """The ``fallbacks`` of the machine, and the ``max_cost`` of all its steps; None without any.

        A bundle goes to the first machine alone. Raises ``ConfigurationError``.
        """
        from dstack_core.integration import host_fallbacks

        fallbacks = host_fallbacks(self.fallbacks, self.fallback_on_exit)
        if fallbacks is None or self._bundle_is is not None:
            return None
        return {"fallbacks": fallbacks, "max_cost": self.max_cost}

    @property
    def lacks_bundle(self) -> bool:
        """Whether the flow run has a bundle that is not here."""
        return self._bundle_is is not None and self._bundle is None

    def names(self, flow_run_id: UUID) -> AttemptNames:
        """Return the names of the flow run's machines, made of what Prefect labels this one with."""
        return machine_names(flow_run_id, self.labels)

    @property
    def automatic_tags(self) -> dict[str, str]:
        """The tags that name the owner of this machine in the bill of a cloud."""
        return tags_of_worker(self.labels)

    @property
    def all_callbacks(self) -> list[Any]:
        """The callbacks: paths, and what this process alone has."""
        return [*(self.callbacks or ()), *self._own_callbacks]

    def call_too(self, own: list[Any]) -> None:
        """Call classes and instances that another process cannot import."""
        self._own_callbacks = own

    def carry(self, parcel: Parcel, folder: Path) -> None:
        """Upload the flow run's bundle with its machine and run it there.

        ``folder`` is an empty one, which must exist until the machine has been submitted. The keys of the
        Prefect server leave the environment, which everybody in the project can read.
        """
        self.env, secret = _bundles.without_secrets(self.env)
        given = self.configuration.get("env") or {}
        pairs = given if isinstance(given, dict) else dict(_pair(item) for item in given)
        parts = _bundles.secret_parts({**pairs, **self.env}, self.secrets_in)
        masked = {**parts, **{name: [] for name in secret}}
        parcel.write(folder, secret, masked, image_key=self._image_key)
        self._bundle = parcel, folder

    def task(self) -> dict[str, Any]:
        """Return the task with the keys of a ``.dstack.yml``.

        A field wins over the same key of ``configuration``. Raises ``ConfigurationError`` for a
        configuration that is not a task, and for files that the work pool does not allow.
        """
        kind = self.configuration.get("type", "task")
        if kind != "task":
            _refuse(f"configuration: expected a task, which a flow run runs in, got a {kind!r}. Drop type.")
        self._check_uploads()
        task = dict(self.configuration)
        if self.image is not None:
            task["image"] = self.image
        # Otherwise dstack takes an image of its own, which has no Prefect.
        if self._image_key is None:
            task["image"] = _prefect_image() if self._bundle is None else self._bundle[0].image
        placed = [] if self.repo_dir is None else place_code(self._repo_dir(), self._directory)
        if self._bundle is None or self._flow_run_id is None:
            return {**task, "type": "task", "commands": [*placed, self.command]}
        # The file of the bundle is not one that a deployment chose.
        upload = {"local_path": str(self._bundle[1]), "path": _bundles.place(self._flow_run_id)}
        task["files"] = [*(task.get("files") or []), upload]
        before = task.get("commands") or []
        return {**task, "type": "task", "commands": [*before, _bundles.command(self._flow_run_id)]}

    @property
    def _image_key(self) -> str | None:
        """The key that chooses the image; None for the default."""
        given = {**self.configuration, **({} if self.image is None else {"image": self.image})}
        return next((key for key in ("image", "python", "docker") if key in given), None)

    def submission(self, login: GitLogin) -> Submission:
        """Return what to submit for the flow run. Raises ``ConfigurationError``."""
        from prefect_dstack._options import OPTION_NAMES, STEP_NAMES

        names = OPTION_NAMES - STEP_NAMES - {"reports"}
        given = {name: getattr(self, _FIELDS.get(name, name)) for name in names}
        # The run is a flow run, which returns its results through Prefect.
        given["reports"] = False
        if self.repo_dir is not None:
            given["repo_dir"] = self._repo_dir()
        found = resolve(
            self.task(),
            given,
            login,
            folder=self._directory,
            secret_names=self._secret_names,
            # A work pool may set mask_env for flow runs of which not all have the variable.
            names_exist=self._has_own_mask,
        )
        if self.fallbacks and self.ladder is None:
            found.warnings.append(_NO_FALLBACKS)
        return found

    def secrets_in(self, env: Mapping[str, str]) -> list[str]:
        """Return what a log must not show, of the machine's environment and its registry's password."""
        from dstack_core.integration import collect_secrets

        auth = collect_secrets({"registry_auth": self.configuration.get("registry_auth")})
        return [*Masking(self.mask_env, self._secret_names).secrets_in(env), *auth]

    def git(self) -> GitCredentialsLike:
        """Return the Git credentials of this flow run, if it has its own.

        Prefect has already replaced a block placeholder by its fields, or by the text of a ``Secret`` block.
        """
        given = self.git_credentials
        return name_or_secret(SecretStr(given)) if isinstance(given, str) else given

    def _repo_dir(self) -> Path:
        path = Path(self.repo_dir or "").expanduser()
        if not path.is_absolute() and self._directory is None:
            _refuse(
                f"repo_dir: expected an absolute path, got {self.repo_dir!r}. This deployment's code is in "
                "no directory of the worker's machine."
            )
        return Path(os.path.normpath((self._directory or Path()) / path))

    def _check_uploads(self) -> None:
        repos = self.configuration.get("repos") or []
        local = [repo for repo in repos if not _is_remote(repo)]
        wanted = {"repo_dir": self.repo_dir, "files": self.configuration.get("files"), "repos": local}
        names = [name for name, value in wanted.items() if value]
        if names and self.uploads != "allowed":
            _refuse(
                f"{' and '.join(names)}: expected a work pool that allows uploads, got one that does not. "
                'Set "uploads": "allowed" in the job_configuration of the pool\'s base job template.'
            )

    def check_reach(self, dstack_url: str) -> None:
        """Raise ``ConfigurationError`` when the machine cannot reach the Prefect server.

        An address of this machine alone is fine if the dstack server is here too, which may then run
        jobs here.
        """
        url = self.env.get("PREFECT_API_URL")
        if not url:
            _refuse(
                "PREFECT_API_URL: expected the address of the Prefect server, got none. Set it for the "
                "worker."
            )
        if _is_local(url) and not _is_local(dstack_url):
            where = "the work pool's or deployment's env" if self._bundle_is is None else "env of @dstack"
            _refuse(
                f"PREFECT_API_URL: {url!r} is an address no other machine can reach. Set one that it can in "
                f"{where}."
            )


def _prefect_image() -> str:
    import sys

    import prefect

    return f"prefecthq/prefect:{prefect.__version__}-python{sys.version_info.major}.{sys.version_info.minor}"


def _pair(item: Any) -> tuple[str, str | None]:
    name, equals, value = str(item).partition("=")
    return name, value if equals else None


def _is_remote(repo: Any) -> bool:
    """Whether an item of ``repos`` is a repository elsewhere, not a directory of this machine."""
    if isinstance(repo, dict):
        return not repo.get("local_path")
    return "://" in str(repo) or "@" in str(repo)


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refuse(message: str) -> NoReturn:
    from dstack_core import ConfigurationError

    raise ConfigurationError(message)


def directory_of(deployment: DeploymentResponse | None) -> Path | None:
    """Return the directory that a deployment's code is in; None where it is pulled from elsewhere."""
    if deployment is None:
        return None
    steps = deployment.pull_steps or []
    named = [inputs.get("directory") for step in steps for name, inputs in step.items() if _STEP in name]
    found = (named[-1] if named else None) if steps else deployment.path
    path = Path(str(found or "")).expanduser()
    return Path(os.path.normpath(path)) if path.is_absolute() else None


def place_code(repo_dir: Path, directory: Path | None) -> list[str]:
    """Return the commands that make ``directory`` lead to its place in the uploaded ``repo_dir``.

    A directory that the machine has at that path is used as it is: it may hold more than the upload.
    """
    if directory is None or not directory.is_relative_to(repo_dir):
        return []
    path, parent = shlex.quote(str(directory)), shlex.quote(str(directory.parent))
    below = directory.relative_to(repo_dir).as_posix()
    code = '"${DSTACK_REPO_DIR:-$PWD}"' + ("" if below == "." else f"/{shlex.quote(below)}")
    used = shlex.quote(f"The flow code is that of {directory} on this machine, not the uploaded one.")
    return [f"if [ -e {path} ]; then echo {used}; else mkdir -p {parent} && ln -s {code} {path}; fi"]


def _has_interruption(option: Any, key: str) -> bool:
    """Whether an option covers interruptions: a dict that names no events covers all of them."""
    if isinstance(option, dict):
        return "interruption" in (option.get(key) or ["interruption"])
    return option not in (None, False)
