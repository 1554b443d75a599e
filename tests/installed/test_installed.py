"""The wheels in environments that plain ``python -m venv`` and pip make, used as a person uses them.

Each environment gets one distribution and what it asks for, at the tested versions (``constraints/``). What
runs there sees nothing of this repository.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstack_core.local import LocalServer
from scripts.distributions import FOLDERS, build
from tests.docs.blocks import blocks_of
from tests.user_project import files_of, write

ROOT = Path(__file__).parent.parent.parent
TUTORIAL = ROOT / "docs" / "tutorials" / "testing.md"
# Of a slow machine, with an empty cache of pip.
INSTALL_SECONDS = 900
RUN_SECONDS = 240
pytestmark = pytest.mark.timeout(INSTALL_SECONDS + RUN_SECONDS)

ATTACH_ERROR = 'pip install "dstack-core[attach]"'

SCRIPT = """
import importlib.util
import dstack_core as dstack

missing = [name for name in ("paramiko", "cryptography", "websockets", "psutil") if not importlib.util.find_spec(name)]
print("missing", *missing)
with dstack.Client.from_config() as client:
    run = client.runs.submit(dstack.Task(commands=["echo hello from $GREETED"], env={"GREETED": "a wheel"}))
    for event in run.follow(poll_interval=0.2):
        if isinstance(event, dstack.LogLines):
            print(*event.lines, sep="\\n")
    print(run.wait().raise_for_status().message)
    before = len(client.runs.list(all=True))
    for attempt in (run.attach, lambda: client.runs.submit(dstack.Task(commands=["true"], ports=["18099:80"]))):
        try:
            attempt()
        except dstack.ConfigurationError as error:
            print(error)
    print("submitted", len(client.runs.list(all=True)) - before)
"""

EMBEDDED = """
import asyncio
import dstack_core as dstack
from dstack_core.local import LocalServer

with LocalServer() as server:
    target = dict(server_url=server.url, project_name=server.project, user_token=server.token)
    with dstack.Client(**target) as client:
        run = client.runs.submit(dstack.Task(commands=["sleep 1; echo live"]))
        with run.attach():
            print(b"".join(run.logs()).decode())

    async def main():
        async with dstack.AsyncClient(**target) as client:
            run = await client.runs.submit(dstack.Task(commands=["true"]))
            print((await run.wait(poll_interval=0.2)).message)

    asyncio.run(main())
"""

DAG_TEST = """
import importlib.util
from pathlib import Path
import airflow_provider_dstack.example_dags

(folder,) = airflow_provider_dstack.example_dags.__path__
path = Path(folder) / "example_dstack_run.py"
spec = importlib.util.spec_from_file_location(path.stem, path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
run = module.dag.test()
print("state", run.state.value)
from airflow.dag_processing.bundles.manager import DagBundlesManager
print("bundles", *[bundle.name for bundle in DagBundlesManager().get_all_dag_bundles()])
print("paramiko", importlib.util.find_spec("paramiko"))
"""

FLOW = """
import importlib.util
from prefect_dstack.example_flows.example_dstack_run import example_dstack_run

print("outcome", example_dstack_run(epochs=2)["status"])
print("paramiko", importlib.util.find_spec("paramiko"))
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of each folder."""
    target = tmp_path_factory.mktemp("wheels")
    return {folder: build(ROOT / folder, target, kinds=("wheel",))[0] for folder in FOLDERS}


def fresh_python() -> str:
    """Return Debian's own Python, or the lowest supported one where that is too old or makes no environments."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    supported = {each.rpartition(" ")[2] for each in project["classifiers"] if "Python :: 3." in each}
    show = "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"
    debian = Path("/usr/bin/python3")
    if debian.exists():
        shown = subprocess.run([debian, "-c", show], capture_output=True, text=True, check=False).stdout
        if shown.strip() in supported:
            return str(debian)
    done = subprocess.run([ROOT / "scripts" / "pythons", "1"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


class Environment:
    """An environment with a home of its own."""

    def __init__(self, folder: Path, server: LocalServer) -> None:
        self._home = folder / "home"
        self._home.mkdir(parents=True)
        self._python = folder / "env" / "bin" / "python"
        # Where packages come from, and through what, is a matter of the machine.
        kept = {
            name: os.environ[name]
            for name in os.environ
            if name.startswith(("PIP_", "SSL_", "UV_")) or name.lower().endswith("_proxy")
        }
        self.variables = {
            **kept,
            "PATH": f"{self._python.parent}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self._home),
            "DSTACK_SERVER_URL": server.url,
            "DSTACK_PROJECT": server.project,
            "DSTACK_TOKEN": server.token,
            "DO_NOT_TRACK": "1",
        }
        subprocess.run([fresh_python(), "-m", "venv", str(folder / "env")], check=True)

    def install(self, *what: str, pins: str) -> None:
        """Install with pip."""
        # What only newer Pythons need is in a file of its own.
        files = (ROOT / "constraints" / f"{pins}{kind}.txt" for kind in ("", ".newer"))
        constraints = [word for file in files if file.exists() for word in ("-c", str(file))]
        self.run(
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            *constraints,
            *what,
            seconds=INSTALL_SECONDS,
        )

    def run(self, *arguments: str, seconds: float = RUN_SECONDS) -> str:
        """Run its Python; return what it printed."""
        done = subprocess.run(
            [self._python, *arguments],
            cwd=self._home,
            env=self.variables,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return done.stdout


def test_a_script_runs_with_the_client_alone_and_attaching_names_the_extra(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    with LocalServer() as server:
        environment = Environment(tmp_path, server)
        environment.install(str(wheels["."]), pins="core")
        environment.run("-m", "pip", "check")
        lines = environment.run("-c", SCRIPT).splitlines()
        assert lines[0] == "missing paramiko cryptography websockets psutil"
        assert lines[1] == "hello from a wheel"
        assert lines[2].startswith("finished")
        assert lines[3].startswith("attach: ")
        assert lines[3].endswith(ATTACH_ERROR)
        assert lines[4].startswith("ports: ")
        assert ATTACH_ERROR in lines[4]
        assert lines[5] == "submitted 0"
        # The embedded server, the async client and attaching are extras of the same wheel.
        environment.install(f"{wheels['.']}[async,local]", pins="core")
        environment.run("-m", "pip", "check")
        shown = environment.run("-c", EMBEDDED)
        assert "live" in shown
        assert "finished" in shown


@pytest.fixture(scope="module")
def airflow(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """An environment with Airflow and the provider; a minute to make."""
    folder = tmp_path_factory.mktemp("airflow")
    with LocalServer() as server:
        environment = Environment(folder, server)
        environment.install(str(wheels["."]), str(wheels["providers/airflow"]), pins="airflow")
        connection = {
            "conn_type": "dstack",
            "host": server.url,
            "login": server.project,
            "password": server.token,
        }
        environment.variables |= {
            "AIRFLOW_HOME": str(folder / "airflow"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "True",
            "AIRFLOW_CONN_DSTACK_DEFAULT": json.dumps(connection),
        }
        yield environment


def test_an_operator_runs_in_a_fresh_airflow(airflow: Environment) -> None:
    airflow.run("-m", "airflow", "db", "migrate")
    lines = airflow.run("-c", DAG_TEST).splitlines()
    assert "state success" in lines
    (bundles,) = (line.split() for line in lines if line.startswith("bundles "))
    assert "airflow-provider-dstack-example-dags" in bundles
    assert "paramiko None" in lines


def test_the_testing_tutorial_from_an_empty_folder(
    airflow: Environment, wheels: dict[str, Path], tmp_path: Path
) -> None:
    first, *others = [block for block in blocks_of(TUTORIAL) if block.info == "shell installed"]
    # The environment of the test before has what this block makes, but the extra.
    assert first.code.splitlines()[-1] == 'pip install airflow-provider-dstack "dstack-core[testing]"'
    airflow.install(f"{wheels['.']}[testing]", pins="airflow")
    airflow.run("-m", "pip", "check")
    write(tmp_path, files_of(TUTORIAL, "python airflow installed"))
    for block in others:
        done = subprocess.run(
            ["sh", "-c", block.code],
            cwd=tmp_path,
            env={name: airflow.variables[name] for name in ("PATH", "HOME", "DO_NOT_TRACK")},
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            check=False,
        )
        # Airflow's packages may warn.
        counted = re.findall(r"\d+ (?:passed|failed|errors?)", done.stdout.strip().rpartition("\n")[2])
        assert (", ".join(counted),) == tuple(each.strip() for each in block.outputs), (
            done.stdout + done.stderr
        )


def test_a_flow_runs_in_a_fresh_prefect(wheels: dict[str, Path], tmp_path: Path) -> None:
    with LocalServer() as server:
        environment = Environment(tmp_path, server)
        environment.install(str(wheels["."]), str(wheels["providers/prefect"]), pins="prefect")
        environment.variables |= {
            "PREFECT_HOME": str(tmp_path / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(RUN_SECONDS),
        }
        lines = environment.run("-c", FLOW).splitlines()
        assert "outcome done" in lines
        assert "paramiko None" in lines
