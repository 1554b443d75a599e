"""The table of docs/configurations.md names every key that dstack reads in a run configuration, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dstack_core._wire.versions import _KEYS
from tests.contract.configurations.clients import JUDGE_VERSION, OfficialClient
from tests.contract.configurations.test_same_specs import KINDS, WANTED
from tests.rig.server_process import DEFAULT_VERSION

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(DEFAULT_VERSION != JUDGE_VERSION, reason="no server is asked: once is enough"),
]

PAGE = (Path(__file__).parents[3] / "docs" / "configurations.md").read_text().partition("## Every key")[2]
VERDICTS = {"taken", "filled in", "elsewhere"}
ROWS = {
    cells[0].strip("`"): cells[1:]
    for line in PAGE.splitlines()
    if len(cells := [cell.strip() for cell in line.strip().strip("|").split("|")]) == 5 and "`" in cells[0]
}
# The page's names for the objects of the schema.
MAPPINGS = {
    "CPUSpec": "resources",
    "DiskSpec": "resources",
    "EntityReference": "fleets",
    "FilePathMapping": "files",
    "FleetInstanceSelector": "instances",
    "GPUSpec": "resources",
    "HTTPHeaderSpec": "probes",
    "HeaderPartitioningKey": "rate_limits",
    "IPAddressPartitioningKey": "rate_limits",
    "InstanceHostnameSelector": "instances",
    "InstanceMountPoint": "volumes",
    "InstanceNameSelector": "instances",
    "NodeGroup": "groups` of a task",
    "OpenAIChatModel": "model",
    "PortMapping": "port",
    "ProbeConfig": "probes",
    "ProfileRetry": "retry",
    "Range_Memory_": "replicas",
    "Range_int_": "replicas",
    "RateLimit": "rate_limits",
    "RegistryAuth": "registry_auth",
    "ReplicaGroup": "groups` of a service",
    "ReplicaGroupRouterConfig": "groups` of a service",
    "RepoSpec": "repos",
    "ResourcesSpec": "resources",
    "ScalingSpec": "scaling",
    "Schedule": "schedule",
    "TGIChatModel": "model",
    "UtilizationPolicy": "utilization_policy",
    "VastAIProfileOptions": "backend_options",
    "VolumeMountPoint": "volumes",
}
# dstack's client stores an env name without a value in this form; it does not belong in a file.
INTERNAL = {"EnvSentinel"}


@pytest.fixture(scope="module")
def schemas(official: OfficialClient) -> dict[str, dict[str, object]]:
    return {kind: official.schema(kind) for kind in KINDS}


def test_the_table_names_each_key_and_the_types_that_have_it(schemas: dict[str, dict[str, object]]) -> None:
    having: dict[str, list[str]] = {}
    for kind, schema in schemas.items():
        for key in schema["properties"]:  # type: ignore[attr-defined]
            having.setdefault(key, []).append(kind)
    documented = {key: list(KINDS) if row[0] == "all" else row[0].split(", ") for key, row in ROWS.items()}
    assert documented == having


def test_each_row_has_a_verdict_and_the_server_version_the_client_requires() -> None:
    for key, (_, verdict, since, what) in ROWS.items():
        assert verdict in VERDICTS, key
        assert what or verdict == "taken", f"{key}: describe what happens to it"
        # The code of `repos` reaches every server; only its path and if_exists need a newer one.
        release = {"repos": None, "groups": (0, 21, 2)}.get(key, _KEYS.get(key))
        assert since == ("" if release is None else ".".join(map(str, release))), key


def test_each_key_of_a_mapping_is_named(schemas: dict[str, dict[str, object]]) -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| `")]
    for schema in schemas.values():
        for name, definition in schema["$defs"].items():  # type: ignore[attr-defined]
            if "properties" not in definition or name in INTERNAL:
                continue
            (row,) = [
                line for line in lines if line.startswith(f"| `{MAPPINGS[name]}") and line.count("|") == 3
            ]
            missing = [key for key in definition["properties"] if f"`{key}`" not in row]
            assert missing == [], f"{name}: {row}"


def test_each_intended_difference_has_a_row() -> None:
    documented = PAGE.partition("On purpose they differ")[2]
    rows = re.findall(r"^\| [^-w].*$", documented, re.MULTILINE)
    assert len([row for row in rows if row.count("|") == 4]) == len(WANTED)
