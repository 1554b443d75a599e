"""Every key of a configuration, in the forms users write and in wrong forms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.contract.combined_forms import COMBINED, GROUP, SCALED
from tests.contract.value_forms import (
    COUNTS,
    DURATIONS,
    ENVS,
    FILES,
    MOUNTS,
    PORTS,
    REFERENCES,
    REPOS,
    RESOURCES,
    RETRIES,
    SWITCHES,
    TEXTS,
)

_SCHEDULING: dict[str, list[Any]] = {
    "backends": [[], ["aws"], ["aws", "gcp"], "aws", ["nowhere"], ["local"], ["remote"], ["AWS"], None],
    "regions": [[], ["eu"], "eu", [1], [None], None],
    "availability_zones": [["a"], "a", {}],
    "instance_types": [["a"], "a", [[]]],
    "reservation": TEXTS,
    "spot_policy": ["spot", "on-demand", "auto", "Spot", "sometimes", "", True, None],
    "retry": RETRIES,
    "max_duration": DURATIONS,
    "stop_duration": DURATIONS,
    "idle_duration": DURATIONS,
    "max_price": [1, 0.5, "2.5", "x", 0, -1, True, [], None],
    "creation_policy": ["reuse", "reuse-or-create", "create", None],
    "utilization_policy": [
        *(
            {"min_gpu_utilization": 10, "time_window": "30m"},
            {"min_gpu_utilization": 101, "time_window": "30m"},
        ),
        *({"min_gpu_utilization": 10, "time_window": "1m"}, {"min_gpu_utilization": 10}, {}, True, None),
    ],
    "startup_order": ["any", "master-first", "workers-first", "last", None],
    "stop_criteria": ["all-done", "master-done", "never", None],
    "fleets": [[], *([one] for one in REFERENCES), "rig", ["rig", "other/rig"], None],
    "instances": [
        *(
            [],
            ["i"],
            [{"name": "i"}],
            [{"hostname": "h"}],
            [{"fleet": "f", "instance": 0}],
            "i",
            [""],
            [{}],
            None,
        ),
        *([{"fleet": {"name": "f"}, "instance": 1}], [{"fleet": "a/b/c", "instance": 1}], [{"fleet": "f"}]),
        *([{"fleet": "f", "instance": -1}], [{"name": "i", "hostname": "h"}]),
    ],
    "tags": [
        {},
        {"a": "b"},
        {"a b": "c"},
        {"a": "b c/:=@+"},
        {"a": "ü"},
        {"a": 1},
        {"a" * 61: "b"},
        {"a": "b" * 257},
        ["a"],
        None,
    ],
    "backend_options": [
        *([], [{"type": "vastai"}], [{"type": "vastai", "min_score": 300}], [{"type": "aws"}], None),
        *(
            [{"type": "vastai"}, {"type": "vastai"}],
            [{"type": "vastai", "min_reliability": 2}],
            {"type": "vastai"},
        ),
        *([{"type": "vastai", "offer_order": "price"}], [{}], [{"type": "vastai", "offer_order": "luck"}]),
    ],
    "schedule": [None, {}, {"cron": []}, "0 * * * *", {"cron": 1}],
}
_COMMON: dict[str, list[Any]] = {
    "name": TEXTS,
    "image": TEXTS,
    "user": [
        "root",
        "1000",
        "1000:1000",
        "root:root",
        "-1",
        "a:-1",
        "a:b:c",
        ":",
        "",
        "a:",
        ":b",
        1000,
        None,
    ],
    "privileged": SWITCHES,
    "entrypoint": TEXTS,
    "working_dir": ["/x", "x", "~/x", "", 1, None],
    "home_dir": ["/root", "", 1, None],
    "registry_auth": [
        {"username": "u", "password": "p"},
        {"password": "p"},
        {"username": "u"},
        {},
        "u:p",
        None,
        {"username": 1, "password": 2},
    ],
    "python": ["3.9", "3.10", 3.1, 3.11, 3.12, 3, "3", "3.7", 3.7, "3.16", "3.15", "", True, None, []],
    "nvcc": SWITCHES,
    "docker": SWITCHES,
    "single_branch": SWITCHES,
    "env": ENVS,
    "shell": ["sh", "bash", "/bin/zsh", "zsh", "", "bin/zsh", 1, None],
    "resources": RESOURCES,
    "priority": [0, 50, 100, 101, -1, "7", "x", 1.5, True, None],
    "volumes": [[], "vol:/data", None, *([one] for one in MOUNTS)],
    "repos": [[], None, ["a", "b"], *([one] for one in REPOS)],
    "files": [[], None, "a", *([one] for one in FILES)],
    "dstack": SWITCHES,
    "setup": [[], ["x"], "x", [1], None],
    **{key: [[], {}, None, "x"] for key in ("build", "cache", "artifacts", "retry_policy", "gpu")},
}
_OF_TYPE: dict[str, dict[str, list[Any]]] = {
    "task": {
        "commands": [["x"], [], "x", [42], [True], [None], [""], None, ["a", "b &"]],
        "nodes": [1, 2, "2", 0, -1, 1.5, "x", True, None],
        "ports": [[], None, 80, *([one] for one in PORTS)],
        "groups": [None, [], [{}], [{"commands": ["x"]}], {"commands": ["x"]}],
        "init": [[], ["x"]],
        "port": [80],
    },
    "service": {
        "commands": [["x"], [], "x", [42], None],
        "port": [*PORTS],
        "gateway": [True, False, "true", "no", 1, 0, 2, *REFERENCES],
        "strip_prefix": SWITCHES,
        "auth": SWITCHES,
        "https": [True, False, "auto", "true", "never", None, 1],
        "model": [
            *("llama", "", 1, None, {}, {"name": "m", "format": "openai"}, {"name": "m", "format": "tgi"}),
            *(
                {"name": "m"},
                {"name": "m", "format": "x"},
                {"format": "openai", "name": "m", "prefix": "/v2"},
            ),
            *(
                {"type": "chat", "name": "m", "format": "tgi", "eos_token": "e"},
                {"type": "x", "name": "m", "format": "tgi"},
            ),
        ],
        "replicas": [*COUNTS, [GROUP], [GROUP, GROUP], [], None],
        "scaling": [None, SCALED, {}],
        "rate_limits": [
            *(
                [],
                [{"rps": 1}],
                [{"rps": 0}],
                [{"rps": 1}, {"rps": 2}],
                [{"rps": 1, "prefix": "x"}],
                [{}],
                None,
            ),
            *(
                [{"rps": 1, "key": {"type": "header", "header": "X-A"}}],
                [{"rps": 1, "key": {"type": "ip_address"}}],
            ),
            *(
                [{"rps": 1, "key": {"type": "header", "header": "a b"}}],
                [{"rps": 1, "burst": -1}],
                [{"rps": 1, "key": {}}],
            ),
            *(
                [{"rps": 1, "prefix": "/a"}, {"rps": 2, "prefix": "/b", "burst": 3}],
                [{"rps": 1, "prefix": "/a b"}],
            ),
        ],
        "probes": [
            *([], None, [{"type": "http"}], [{"type": "http"}, {"type": "http"}], [{"type": "exec"}], [{}]),
            *(
                [{"type": "http", "url": value}]
                for value in ["/", "/a?b", "x", "", "/" + "a" * 2048, "/\n", None]
            ),
            *([{"type": "http", "method": value}] for value in ["get", "post", "GET", "x", None]),
            *([{"type": "http", "timeout": value}] for value in [*DURATIONS, 0.5]),
            *([{"type": "http", "interval": value}] for value in [0, "1s", -1, "15s"]),
            *([{"type": "http", "body": "b", "method": value}] for value in ["post", "get", "head", None]),
            *([{"type": "http", "ready_after": value}] for value in [0, 1, "2"]),
            *(
                [{"type": "http", "headers": value}]
                for value in [[], [{"name": "a", "value": "b"}], [{"name": ""}], {}]
            ),
            [
                {"type": "http", "until_ready": True, "url": "/", "timeout": "5s"},
                {"type": "http", "url": "/b"},
            ],
        ],
        "groups": [None, [], [GROUP], [{"commands": ["x"]}]],
        "nodes": [1],
        "ports": [[80]],
    },
    "dev-environment": {
        "ide": ["vscode", "cursor", "windsurf", "zed", "emacs", "", None],
        "version": ["1.0", 1.5, None],
        "init": [[], ["x"], "x", [1], None],
        "inactivity_duration": DURATIONS,
        "ports": [[], [8080], ["*:80"]],
        "commands": [["x"]],
    },
}
_BASES: dict[str, dict[str, Any]] = {
    "task": {"type": "task", "commands": ["true"]},
    "service": {"type": "service", "commands": ["true"], "port": 80},
    "dev-environment": {"type": "dev-environment", "ide": "vscode"},
}
_SPECS: list[dict[str, Any]] = [
    {"run_name": "a-b"}, {"run_name": "A"}, {"run_name": ""}, {"run_name": "a" * 41}, {"run_name": "a" * 42}, {"run_name": 1},
    {"repo_id": "r"}, {"repo_data": {"repo_type": "virtual"}}, {"repo_id": "r", "repo_data": {"repo_type": "virtual"}},
    {"repo_id": "r", "repo_data": {"repo_type": "local"}}, {"repo_id": "r", "repo_data": {"repo_type": "local", "repo_dir": "/x"}},
    {"repo_id": "r", "repo_data": {"repo_type": "remote", "repo_name": "n", "repo_branch": "b", "repo_hash": "h"}},
    {"repo_id": "r", "repo_data": {"repo_type": "remote"}}, {"repo_id": "r", "repo_data": {"repo_type": "x"}},
    {"repo_dir": "/x"}, {"working_dir": "x"}, {"configuration_path": "p"}, {"ssh_key_pub": "k"}, {"x": 1},
    {"file_archives": [{"id": "3f2c7f8e-1e5d-4c43-9f3a-111111111111", "path": "/x"}]}, {"file_archives": [{"id": "x", "path": "/x"}]},
    {"file_archives": [{"path": "/x"}]}, {"profile": {}}, {"profile": None}, {"profile": {"name": "p", "default": True}},
    {"profile": {"retry": {"duration": -1}}}, {"profile": {"x": 1}}, {"profile": "p"}, {"merged_profile": {}}, {"merged_profile": None}, {"merged_profile": {"x": 1}},
    *({"profile": {"name": "p", key: value}} for key, values in _SCHEDULING.items() for value in values),
]  # fmt: skip


def run_specs() -> Iterator[dict[str, Any]]:
    """Return every run spec to judge."""
    for kind, base in _BASES.items():
        keys = {**_SCHEDULING, **_COMMON, **_OF_TYPE[kind]}
        for key, values in keys.items():
            for value in values:
                yield {"configuration": {**base, key: value}}
    yield from ({"configuration": configuration} for configuration in COMBINED)
    yield from ({"configuration": _BASES["task"], **spec} for spec in _SPECS)
