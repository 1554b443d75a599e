"""Every key of a configuration, in the forms users write and in wrong forms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
_GROUP = {"replicas": 1, "commands": ["x"]}
_SCALED = {"metric": "rps", "target": 1}
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
        "replicas": [*COUNTS, [_GROUP], [_GROUP, _GROUP], [], None],
        "scaling": [None, _SCALED, {}],
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
        "groups": [None, [], [_GROUP], [{"commands": ["x"]}]],
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
# Forms that depend on more than one key.
_TOGETHER: list[dict[str, Any]] = [
    {"type": "task", "commands": ["x"], "image": "i", "python": "3.11"},
    {"type": "task", "commands": ["x"], "image": "", "python": "3.11"},
    {"type": "task", "commands": ["x"], "image": "i", "docker": True},
    {"type": "task", "commands": ["x"], "image": "i", "docker": False},
    {"type": "task", "commands": ["x"], "python": "3.11", "docker": True},
    {"type": "task", "commands": ["x"], "nvcc": True, "docker": True},
    {"type": "task", "commands": ["x"], "nvcc": True, "image": "i"},
    {"type": "task", "commands": ["x"], "docker": True, "privileged": False},
    *(
        {"type": "task", "commands": [f"echo ${{{{ {name} }}}}"]}
        for name in (
            *("groups[0].nodes[0].IP_ADDRESS", "groups[0].nodes[1].IP_ADDRESS", "groups[1].nodes[0].IP_ADDRESS"),
            *("groups[0].replicas[0].IP_ADDRESS", "groups[0].nodes[0].ADDRESS", "groups", "run.args", "env.X", "secrets.x"),
        )
    ),
    {"type": "task", "commands": ["x"], "env": {"A": "${{ groups[0].nodes[0].IP_ADDRESS }}"}},
    {"type": "task", "commands": ["x"], "env": {"A": "$${{ groups[0].nodes[0].IP_ADDRESS }}"}},
    {"type": "service", "port": 80, "commands": ["echo ${{ groups[0].replicas[0].IP_ADDRESS }}"]},
    {"type": "service", "port": 80, "commands": ["echo ${{ groups[0].replicas[1].IP_ADDRESS }}"]},
    {"type": "task", "image": "i"},
    {"type": "task", "image": ""},
    {"type": "task"},
    {"type": "task", "image": "i", "resources": {"gpu": "amd"}},
    {"type": "task", "commands": ["x"], "docker": True, "resources": {"gpu": "MI300X"}},
    {"type": "task", "image": "i", "resources": {"gpu": "A100:2"}},
    {"type": "task", "commands": ["x"], "nodes": 2, "groups": [{"commands": ["x"]}]},
    {"type": "job", "commands": ["x"]},
    {"commands": ["x"]},
    {"type": "service", "commands": ["x"]},
    {"type": "service", "port": 80},
    {"type": "service", "image": "i", "port": 80},
    {"type": "service", "commands": ["x"], "port": 80, "replicas": "1..2", "scaling": _SCALED},
    {"type": "service", "commands": ["x"], "port": 80, "replicas": 2, "scaling": _SCALED},
    {"type": "service", "commands": ["x"], "port": 80, "replicas": 1, "groups": [_GROUP]},
    *(
        {"type": "service", "commands": ["x"], "port": 80, "replicas": "0..2", "scaling": {**_SCALED, **more}}
        for more in (
            *({"window": 30}, {"window": "1m"}, {"window": 31}, {"target": 0}, {"metric": "cpu"}, {"x": 1}),
            *({"scale_up_delay": "1m", "scale_down_delay": -1}, {"scale_up_delay": "soon"}),
        )
    ),
    *({"type": "task", "image": "i", "groups": [group]} for group in ({}, {"nodes": 0}, {"nodes": 2, "name": "a"}, {"name": "A"})),
    *({"type": "task", "groups": groups} for groups in (
        [{"commands": ["x"]}], [{"commands": ["x"], "name": "a"}, {"commands": ["y"], "nodes": 2}], [{"nodes": 2}],
        [{"commands": ["x"], "name": "a"}, {"commands": ["x"], "name": "a"}], [{"commands": ["x"], "ports": [80]}],
        [{"commands": ["x"], "resources": {"gpu": "24GB"}}], [{"commands": ["x"], "resources": {"gpu": "amd"}}],
        [{"commands": ["x"], "name": "1"}, {"commands": ["x"]}], [{"commands": ["x"], "image": "i"}],
    )),
    {"type": "task", "groups": [{"commands": ["x"]}], "ports": [80]},
    {"type": "task", "groups": [{"commands": ["x"]}], "entrypoint": "e"},
    {"type": "task", "groups": [{"commands": ["x"]}], "commands": ["y"]},
    *({"type": "service", "port": 80, "groups": groups} for groups in (
        [_GROUP], [{"count": 2, "commands": ["x"]}], [{"count": 1, "replicas": 2, "commands": ["x"]}], [{"replicas": 1}],
        [{**_GROUP, "replicas": "0..2"}], [{**_GROUP, "replicas": "0..2", "scaling": _SCALED}], [{**_GROUP, "router": {}}],
        [{**_GROUP, "router": {"type": "smg"}}], [{**_GROUP, "router": {"type": "dynamo"}}, {**_GROUP, "name": "w"}],
        [{**_GROUP, "router": {}}, {**_GROUP, "router": {}, "name": "b"}], [{**_GROUP, "router": {}, "replicas": 2}],
        [{**_GROUP, "image": "i", "python": "3.11"}], [{**_GROUP, "docker": True, "privileged": False}],
        [{**_GROUP, "docker": True, "nvcc": True}], [{**_GROUP, "python": 3.1}], [{"image": "i", "replicas": 1}],
    )),
    *({"type": "service", "port": 80, **top, "groups": [{**_GROUP, **group}]} for top, group in (
        ({"image": "i"}, {}), ({"image": "i"}, {"image": "j"}), ({"image": "i"}, {"python": "3.11"}), ({"docker": True}, {"image": "j"}),
        ({"python": "3.11"}, {"docker": True}), ({"nvcc": True}, {"nvcc": False}), ({"nvcc": False}, {"nvcc": True}),
        ({"privileged": True}, {"privileged": True}), ({"spot_policy": "spot"}, {"spot_policy": "auto"}),
        ({"spot_policy": "spot"}, {}), ({"reservation": "r"}, {"reservation": "s"}), ({"scaling": _SCALED}, {}),
        ({"commands": ["y"]}, {}), ({"retry": True}, {"router": {"type": "dynamo"}}), ({"image": "i"}, {"commands": []}),
    )),
    {"type": "dev-environment"},
    {"type": "dev-environment", "version": "1.0"},
    {"type": "dev-environment", "ide": "windsurf", "version": "1.0"},
    {"type": "dev-environment", "ide": "windsurf", "version": "1.106.0@8951cd3ad688"},
    {"type": "dev-environment", "entrypoint": "e"},
    {"type": "dev-environment", "dstack": True, "inactivity_duration": "1h"},
    {"type": "dev-environment", "dstack": True, "inactivity_duration": "off"},
]  # fmt: skip
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
    yield from ({"configuration": configuration} for configuration in _TOGETHER)
    yield from ({"configuration": _BASES["task"], **spec} for spec in _SPECS)
