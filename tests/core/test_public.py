"""The public surface: a sorted list, sync and async twins with equal signatures, cheap imports."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest

import dstack_core as dstack
from dstack_core import integration

TWINS = [
    (dstack.Client, dstack.AsyncClient),
    (dstack.RunCollection, dstack.AsyncRunCollection),
    (dstack.RepoCollection, dstack.AsyncRepoCollection),
    (dstack.FunctionCollection, dstack.AsyncFunctionCollection),
    (dstack.FunctionRun, dstack.AsyncFunctionRun),
    (dstack.Run, dstack.AsyncRun),
    (dstack.ProjectCollection, dstack.AsyncProjectCollection),
    (dstack.BackendCollection, dstack.AsyncBackendCollection),
    (dstack.FleetCollection, dstack.AsyncFleetCollection),
    (dstack.VolumeCollection, dstack.AsyncVolumeCollection),
    (dstack.SecretCollection, dstack.AsyncSecretCollection),
    (dstack.GatewayCollection, dstack.AsyncGatewayCollection),
]


def test_all_is_sorted_and_complete() -> None:
    assert dstack.__all__ == sorted(dstack.__all__, key=_as_ruff_sorts)
    homes = {name for names in dstack._HOMES.values() for name in names}
    assert homes | {"__version__"} == set(dstack.__all__)
    for name in dstack.__all__:
        assert getattr(dstack, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        getattr(dstack, "nonsense")  # noqa: B009


def _as_ruff_sorts(name: str) -> tuple[int, str]:
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def members(kind: type) -> dict[str, Any]:
    return {
        {"__aenter__": "__enter__", "__aexit__": "__exit__"}.get(name, name): value
        for name, value in vars(kind).items()
        if not name.startswith("_")
        or name in ("__enter__", "__exit__", "__aenter__", "__aexit__", "__init__")
    }


@pytest.mark.parametrize(("sync", "twin"), TWINS, ids=lambda kind: kind.__name__)
def test_twins_have_equal_signatures(sync: type, twin: type) -> None:
    assert members(sync).keys() == members(twin).keys()
    for name, member in members(sync).items():
        other = members(twin)[name]
        assert type(member) is type(other), name
        if inspect.isfunction(member) and name not in ("__enter__", "__exit__", "__init__"):
            ours, theirs = (inspect.signature(item).parameters for item in (member, other))
            assert [(p.name, p.kind, p.default) for p in ours.values()] == [
                (p.name, p.kind, p.default) for p in theirs.values()
            ], name


@pytest.mark.parametrize(
    "name", [name for name in dstack.__all__ if name not in ("ConfigurationLike", "__version__")]
)
def test_every_public_name_is_documented(name: str) -> None:
    thing = getattr(dstack, name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        for member_name, member in vars(thing).items():
            if not member_name.startswith("_") and (
                inspect.isfunction(member) or isinstance(member, property)
            ):
                assert inspect.getdoc(member), f"{name}.{member_name}"


def test_what_engines_use_is_sorted_and_documented() -> None:
    assert integration.__all__ == sorted(integration.__all__, key=_as_ruff_sorts)
    for name in integration.__all__:
        thing = getattr(integration, name)
        assert name.isupper() or name == "MaskEnv" or inspect.getdoc(thing), name


@pytest.mark.parametrize("name", ["choose_attempt", "follow_steps", "newest_step", "stop_run"])
def test_twins_for_engines_have_equal_signatures(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(integration, each)) for each in (name, f"a{name}"))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]


def test_importing_the_package_loads_no_client_and_prints_nothing() -> None:
    code = (
        "import sys, dstack_core; dstack_core.RunStatus; "
        "sys.exit(bool({'requests','httpx','paramiko','yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
