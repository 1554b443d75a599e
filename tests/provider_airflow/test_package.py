"""What Airflow sees of the package before any task runs."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # comes with Airflow, without stubs
import pytest
from airflow.sdk import BaseOperator

from airflow_provider_dstack import __version__
from airflow_provider_dstack.decorators import DstackDecoratedOperator
from airflow_provider_dstack.get_provider_info import get_provider_info
from airflow_provider_dstack.operators import DstackRunOperator
from airflow_provider_dstack.reaper import DstackReapOperator
from airflow_provider_dstack.services import DstackStopRunOperator
from tests.provider_airflow.versions import needs_3_2

_FORBIDDEN = (
    "requests",
    "httpx",
    "paramiko",
    "dstack_core.",
    "airflow.triggers.base",
)
_IMPORT = """
import json, sys
from airflow.sdk import DAG
before = set(sys.modules)
import airflow_provider_dstack.{module}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.mark.parametrize("module", ["operators", "services", "reaper", "sensors", "decorators", "links"])
def test_importing_what_a_dag_file_imports_is_light(module: str) -> None:
    program = _IMPORT.format(module=module)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    added = json.loads(done.stdout.splitlines()[-1])
    assert f"airflow_provider_dstack.{module}" in added
    assert not [name for name in added if name.startswith(_FORBIDDEN)]


def test_get_provider_info_imports_nothing() -> None:
    source = Path(inspect.getfile(get_provider_info)).read_text()
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imports == ["from __future__ import annotations", "from typing import Any"]


def test_provider_info_is_valid_for_airflow() -> None:
    schema = json.loads(files("airflow").joinpath("provider_info.schema.json").read_text())
    jsonschema.validate(get_provider_info(), schema)


def test_the_entry_point_leads_to_the_provider_info() -> None:
    found = [one for one in entry_points(group="apache_airflow_provider") if "dstack" in one.value]
    assert [one.load() for one in found] == [get_provider_info]
    assert found[0].dist is not None
    assert found[0].dist.version == __version__


def test_everything_named_in_the_provider_info_exists() -> None:
    info = get_provider_info()
    modules = [
        name
        for kind in ("operators", "sensors", "hooks", "triggers")
        for name in info[kind][0]["python-modules"]
    ]
    for name in modules:
        __import__(name)
    module, _, cls = info["connection-types"][0]["hook-class-name"].rpartition(".")
    hook = getattr(sys.modules[module], cls)
    assert hook.conn_type == info["connection-types"][0]["connection-type"]
    for path in [*info["extra-links"], *info["cli"], info["task-decorators"][0]["class-name"]]:
        module, _, name = path.rpartition(".")
        assert callable(getattr(import_module(module), name))


@needs_3_2
def test_the_provider_manager_knows_the_connection_form() -> None:
    from airflow.providers_manager import ProvidersManager

    manager: Any = ProvidersManager()  # type: ignore[no-untyped-call]  # Airflow's is untyped
    assert "extra__dstack__verify" in manager.connection_form_widgets
    behaviour = manager.field_behaviours["dstack"]
    assert behaviour["relabeling"] == {"host": "Server URL", "login": "Project", "password": "Token"}


@pytest.mark.slow
def test_airflow_shows_the_provider() -> None:
    airflow = Path(sys.executable).with_name("airflow")
    command = [str(airflow), "providers", "get", "airflow-provider-dstack", "--full", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    # Airflow writes warnings to the same stream, which begin with a bracket too.
    (told,) = json.loads(done.stdout[done.stdout.index("[{") :])
    assert told["package-name"] == "airflow-provider-dstack"
    shown = json.dumps(told)
    for name in ("DstackRunLink", "DstackServiceLink", "DstackHook", "sensors", "decorators.dstack_task"):
        assert name in shown


@pytest.mark.slow
def test_airflow_lists_the_provider() -> None:
    airflow = Path(sys.executable).with_name("airflow")
    done = subprocess.run(
        [airflow, "providers", "list", "-o", "json"], capture_output=True, text=True, check=True, timeout=120
    )
    listed = json.loads(done.stdout[done.stdout.index("[{") :])
    assert ("airflow-provider-dstack", __version__) in [
        (one["package_name"], one["version"]) for one in listed
    ]


@pytest.mark.parametrize(
    "operator", [DstackRunOperator, DstackStopRunOperator, DstackReapOperator, DstackDecoratedOperator]
)
def test_no_argument_has_a_name_of_airflows_own(operator: type[BaseOperator]) -> None:
    own = set(inspect.signature(BaseOperator.__init__).parameters)
    # It is recognized by its value, and passed on as run_resources.
    allowed = {"resources"} if operator is DstackDecoratedOperator else set()
    if operator is DstackReapOperator:
        # A method of BaseOperator, which it does not hide: the argument is kept under another name.
        allowed = {"dry_run"}
        assert callable(DstackReapOperator(task_id="reap", dry_run=True).dry_run)
    parameters = inspect.signature(operator.__init__).parameters
    added = {name for name in parameters if name not in ("self", "kwargs")} - allowed
    assert not added & own
    assert not [name for name in added if hasattr(BaseOperator, name)]
