"""The checks of ``@dstack`` and of what runs on the machine, without any server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import prefect
import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings

import prefect_dstack
from dstack_core import ConfigurationError
from prefect_dstack import DstackFlow, MachineOptions, dstack
from prefect_dstack._bundles import Parcel, values_to_pickle
from prefect_dstack._worker_variables import DstackJobConfiguration, DstackVariables

MAIN = Path(prefect_dstack.__file__).parent / "_bundle_main.py"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
# Variables of a pool that a flow does not set: its command, what Prefect's own decorators leave out too, and what
# needs a machine to which the code goes again.
NOT_SET = {"command", "name", "labels", "args", "credentials", "fallbacks", "fallback_on_exit"}


@flow
def plain(number: int = 1) -> int:
    return number


def test_the_options_are_the_variables_of_a_pool() -> None:
    assert set(MachineOptions.__optional_keys__) | NOT_SET == set(DstackVariables.model_fields)


def test_the_decorated_flow_is_the_flow() -> None:
    bound = dstack("gpu", resources="24GB..", commands=["pip install torch"])(plain)
    assert isinstance(bound, DstackFlow)
    assert (bound.name, bound.work_pool, bound.plain) == ("plain", "gpu", plain)
    assert bound.job_variables == {
        "resources": "24GB..",
        "configuration": {"commands": ["pip install torch"]},
    }
    again = bound.with_options(retries=2, job_variables={"max_price": 1})
    assert (again.retries, again.job_variables, again.work_pool) == (2, {"max_price": 1}, "gpu")


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"gpu": "H100"}, TypeError, "gpu: expected one of the options"),
        ({"max_price": 0}, ConfigurationError, "max_price"),
        ({"credentials": 3}, ConfigurationError, "credentials: expected a DstackCredentials"),
        ({"tags": {"a b": 1}}, ConfigurationError, "^tags: expected a key .* got 'a b'"),
        ({"tags": "x"}, ConfigurationError, "^tags: expected a dict"),
        ({"debug_on_failure": "soon"}, ConfigurationError, "^debug_on_failure: expected seconds .* 'soon'"),
        ({"commands": "pip install torch"}, ConfigurationError, "commands: expected a list"),
    ],
)
def test_a_wrong_option_is_refused_at_the_flow(options: Any, error: Any, named: str) -> None:
    with pytest.raises(error, match=named):
        dstack(**options)


def test_what_prefect_fills_in_is_not_checked() -> None:
    of_prefect = "{{ prefect.variables.team }}"
    options: Any = {"tags": {"team": of_prefect}, "debug_on_failure": of_prefect}
    bound: Any = dstack(**options)(plain)
    assert bound.job_variables == options


@pytest.mark.parametrize("pool", [plain, 3, ""])
def test_a_decorator_without_parentheses_is_refused(pool: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"expected the name of a work pool.*@dstack\(\)"):
        dstack(pool)


def test_only_a_flow_is_decorated() -> None:
    function: Any = len
    with pytest.raises(ConfigurationError, match="Write @dstack"):
        dstack()(function)


def test_a_prefect_server_without_an_address_is_refused() -> None:
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(ConfigurationError, match="PREFECT_API_URL: expected the address"),
    ):
        dstack()(plain)()


@pytest.mark.parametrize("value", [1, "a", None, True, 1.5, [1, {"a": None}]])
def test_what_json_keeps_is_not_pickled(value: Any) -> None:
    assert values_to_pickle({"x": value}) == {}


@pytest.mark.parametrize("value", [(1,), {1: 2}, b"a", float("nan"), [{"a": {1}}], Path("a")])
def test_what_json_changes_is_pickled(value: Any) -> None:
    assert list(values_to_pickle({"x": value})) == ["x"]


def run_main(
    folder: Path, *options: str, python: str = PYTHON, image_key: str | None = "image"
) -> subprocess.CompletedProcess[str]:
    Parcel(python, "3.8.8", "{}").write(folder, {"NAME": "value"}, {}, image_key=image_key)
    return subprocess.run(
        [sys.executable, *options, str(folder / "run_flow.py")], capture_output=True, text=True, check=False
    )


def test_another_python_on_the_machine_is_named(tmp_path: Path) -> None:
    done = run_main(tmp_path, python="3.9")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"python: expected 3.9, which pickled the flow, got {PYTHON} in this image. "
        f"Choose an image with Python 3.9, or call the flow with Python {PYTHON}.\n"
    )
    # The folder may hold keys.
    assert not tmp_path.exists()


def test_a_missing_prefect_on_the_machine_is_named(tmp_path: Path) -> None:
    done = run_main(tmp_path, "-I", "-S")
    assert done.returncode == 1
    assert done.stderr.startswith("prefect: expected Prefect 3.8.8 in this image, got none")
    assert done.stderr.endswith('commands=["pip install prefect==3.8.8"], or drop image.\n')


@pytest.mark.parametrize(("options", "python"), [(("-I", "-S"), PYTHON), ((), "3.9")])
def test_no_image_is_blamed_where_none_was_named(
    tmp_path: Path, options: tuple[str, ...], python: str
) -> None:
    text = run_main(tmp_path, *options, python=python, image_key=None).stderr
    assert f"in {sys.executable}" in text
    assert "tart the embedded dstack server with a Python with P" in text
    assert "image" not in text


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({}, None),
        ({"image": "ubuntu"}, "image"),
        ({"configuration": {"python": "3.12"}}, "python"),
        ({"configuration": {"docker": True}}, "docker"),
    ],
)
def test_the_machine_knows_what_chose_its_image(
    tmp_path: Path, given: dict[str, Any], key: str | None
) -> None:
    configuration = DstackJobConfiguration(command="true", **given)
    configuration.carry(Parcel(PYTHON, "3.8.8", "{}"), tmp_path)
    assert json.loads((tmp_path / "machine.json").read_text())["image_key"] == key


def test_a_prefect_without_bundles_on_the_machine_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from prefect_dstack import _bundle_main

    monkeypatch.setitem(sys.modules, "prefect.bundles", None)
    found = _bundle_main.problem({"python": "3.11", "prefect": "3.8.8", "image_key": "image"}, "3.11")
    assert found is not None
    assert f"got {prefect.__version__}, which runs no bundles" in found


def test_the_keys_of_the_prefect_server_are_in_the_upload_alone(tmp_path: Path) -> None:
    from types import SimpleNamespace
    from uuid import uuid4

    from prefect_dstack._worker_variables import DstackJobConfiguration

    configuration = DstackJobConfiguration(env={"PREFECT_API_KEY": "pnu_x", "A": "b"}, image="mine")
    flow_run: Any = SimpleNamespace(
        id=uuid4(), name="x", job_variables={"dstack_bundle": "caller"}, work_queue_id=None
    )
    configuration._flow_run_id = flow_run.id
    configuration.carry(Parcel("3.12", "3.8.1", "{}"), tmp_path)
    task = configuration.task()
    assert configuration.env == {"A": "b"}
    assert task["files"] == [{"local_path": str(tmp_path), "path": f"~/.dstack/flow/{flow_run.id}"}]
    assert json.loads((tmp_path / "machine.json").read_text())["environment"] == {"PREFECT_API_KEY": "pnu_x"}
    configuration.image = None
    assert configuration.task()["image"] == "prefecthq/prefect:3.8.1-python3.12"
