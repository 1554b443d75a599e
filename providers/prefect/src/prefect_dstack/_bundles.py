"""Prefect's bundle of a flow run, and its way to the machine without a bucket.

The problem: Prefect's infrastructure decorators pickle flow and parameters into a bundle, upload it to a
bucket that the work pool names, and run it with ``prefect.bundles``. Without a bucket they refuse.

The idea: the run's own upload (``files`` of a dstack task, servers >= 0.19.17) carries the bundle. For a flow
run that a worker of the pool submits, it waits as an artifact of the flow run, of the type that Prefect's UI
does not show; the worker deletes it once the machine has it.

The invariants: the bundle has no settings of the caller's process, since these hold addresses and keys of
that machine; the flow in it is a plain one, since the machine does not have this package.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias
from uuid import UUID

from prefect_dstack import _flow_result

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun

# The job variable for where the bundle of a flow run is: with its caller, or in an artifact.
VARIABLE = "dstack_bundle"
WITH_CALLER, IN_ARTIFACT = "caller", "artifact"
# A Prefect server keeps an artifact in its database and returns it whole.
_ARTIFACT_BYTES = 5_000_000
# These reach the machine in the upload: what is in a run's configuration is shown to the whole project.
_SECRETS = ("PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_CLIENT_CUSTOM_HEADERS")
_MAIN = "run_flow.py"
_SENT = {_MAIN: "_bundle_main.py", "dstack_flow_secrets.py": "_bundle_secrets.py"}
# A value that the dstack server fills in.
_FILLED_IN = "${{"
SecretParts: TypeAlias = dict[str, list[list[int]]]
"""Names of variables, and the parts (start, end) of the value that are secret; no part for all of it."""
# cloudpickle's list of modules that are pickled by value is one for the process.
_pickling = threading.Lock()


@dataclass(frozen=True, slots=True)
class Parcel:
    """A bundle, and the minor version of Python and the version of Prefect that it was made with."""

    python: str
    prefect: str
    bundle: str

    @property
    def image(self) -> str:
        """Return Prefect's own image of these versions."""
        return f"prefecthq/prefect:{self.prefect}-python{self.python}"

    def write(
        self,
        folder: Path,
        environment: Mapping[str, str],
        secrets: SecretParts,
        *,
        image_key: str | None = None,
    ) -> None:
        """Write what the machine gets: the bundle, what runs it, and what its environment has besides.

        ``secrets`` are the variables that are masked there. ``image_key`` chose the image.
        """
        machine = {
            "python": self.python,
            "prefect": self.prefect,
            "environment": dict(environment),
            "secrets": secrets,
            "image_key": image_key,
        }
        (folder / "bundle.json").write_text(self.bundle)
        (folder / "machine.json").write_text(json.dumps(machine))
        for name, source in _SENT.items():
            (folder / name).write_text((Path(__file__).parent / source).read_text())


def values_to_pickle(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that JSON would change."""
    return {name: value for name, value in parameters.items() if not _is_json(value)}


def _is_json(value: Any) -> bool:
    """Whether JSON keeps the value, its type and those of its items."""
    if type(value) is dict:
        return all(type(name) is str and _is_json(item) for name, item in value.items())
    if type(value) is list:
        return all(_is_json(item) for item in value)
    return value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))


def make(flow: Flow[..., Any], flow_run: FlowRun, values: Mapping[str, Any], *, carries: bool) -> Parcel:
    """Return a flow run's bundle.

    Args:
        flow: The flow, one without a machine.
        flow_run: Its flow run.
        values: Parameters that are pickled with the flow, since JSON would change them.
        carries: Whether the flow sends its result by itself.

    Raises:
        ConfigurationError: The flow cannot be pickled.
    """
    import cloudpickle  # type: ignore[import-untyped]  # It has none.
    import prefect
    from prefect.bundles import create_bundle_for_flow_run
    from prefect.context import serialize_context
    from prefect.flows import bind_flow_to_infrastructure
    from prefect.workers.process import ProcessWorker

    if values:
        # Checked where the flow was called.
        flow = flow.with_options(validate_parameters=False)
        flow.fn = _flow_result.with_values(flow.fn, values)
    flow = _flow_result.with_hidden_secrets(flow)
    if carries:
        flow = flow.with_options(
            on_completion=[*flow.on_completion_hooks, _flow_result.send_result],
            on_failure=[*flow.on_failure_hooks, _flow_result.send_result],
        )
    # With a launcher Prefect takes no list of this machine's packages, which the other one would install.
    bound = bind_flow_to_infrastructure(flow, "", ProcessWorker, launcher={"execution": ["python"]})
    # The address and key of the Prefect server are those in the machine's environment.
    context = {**serialize_context(), "settings_context": {}, "flow_run_context": {}, "task_run_context": {}}
    with _pickling:
        cloudpickle.register_pickle_by_value(_flow_result)
        try:
            created = create_bundle_for_flow_run(bound, flow_run, context)
        except Exception as error:
            _refuse(
                f"flow {flow.name}: expected a flow and parameters that can be pickled, got "
                f"{type(error).__name__}: {error}. Create such values inside the flow."
            )
        finally:
            cloudpickle.unregister_pickle_by_value(_flow_result)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Parcel(python, prefect.__version__, json.dumps(created["bundle"]))


def without_secrets(env: Mapping[str, str | None]) -> tuple[dict[str, str | None], dict[str, str]]:
    """Return the environment for the run's configuration, and what only the upload may hold."""
    secret = {name: value for name, value in env.items() if name in _SECRETS and value is not None}
    return {name: value for name, value in env.items() if name not in secret}, secret


def secret_parts(
    env: Mapping[str, Any], secrets_in: Callable[[Mapping[str, str]], Iterable[str]]
) -> SecretParts:
    """Return where in an environment secrets are, without the secrets.

    ``secrets_in`` returns those of an environment; a variable without a value has that of this process.
    """
    found: SecretParts = {}
    for name, given in env.items():
        value = os.environ.get(name, "") if given is None else str(given)
        secrets = list(secrets_in({name: value}))
        if value in secrets or _FILLED_IN in value:
            found[name] = []
        elif parts := [[value.find(one), value.find(one) + len(one)] for one in secrets if one in value]:
            found[name] = parts
    return found


def place(flow_run_id: UUID) -> str:
    """Return the folder of a flow run's bundle on the machine."""
    return f"~/.dstack/flow/{flow_run_id}"


def command(flow_run_id: UUID) -> str:
    """Return the command that runs the bundle on the machine."""
    # Images of Ubuntu and of CUDA have no python, only python3.
    return f'"$(command -v python || command -v python3 || echo python)" {place(flow_run_id)}/{_MAIN}'


async def store(client: PrefectClient, flow_run_id: UUID, parcel: Parcel) -> None:
    """Keep the bundle with the flow run for the worker.

    Raises ``ConfigurationError``, and what Prefect's client raises.
    """
    from prefect.client.schemas.actions import ArtifactCreate

    if len(parcel.bundle) > _ARTIFACT_BYTES:
        _refuse(
            f"bundle: expected at most {_ARTIFACT_BYTES} bytes of pickled flow and parameters, got "
            f"{len(parcel.bundle)}. Pass large values as a path, or call the flow instead."
        )
    data = {_flow_result.KIND: "bundle", **asdict(parcel)}
    await client.create_artifact(
        ArtifactCreate(type=_flow_result.ARTIFACT_TYPE, flow_run_id=flow_run_id, data=data)
    )


async def fetch(flow_run_id: UUID) -> tuple[Parcel, UUID] | None:
    """Return the bundle that is kept with the flow run and its artifact's id. Raises the client's errors."""
    found = await _flow_result.newest(flow_run_id, "bundle")
    if found is None:
        return None
    data: Any = found.data
    return Parcel(**{field.name: data[field.name] for field in fields(Parcel)}), found.id


async def forget(client: PrefectClient, artifact_id: UUID, logger: Any) -> None:
    """Delete a bundle that the machine has."""
    try:
        await client.delete_artifact(artifact_id)
    except Exception as error:
        logger.debug("Could not delete the bundle of this flow run: %s", error)


def _refuse(message: str) -> NoReturn:
    from dstack_core import ConfigurationError

    raise ConfigurationError(message)
