"""Forms of a configuration that depend on more than one key."""

from __future__ import annotations

from typing import Any

GROUP = {"replicas": 1, "commands": ["x"]}
SCALED = {"metric": "rps", "target": 1}
COMBINED: list[dict[str, Any]] = [
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
    {"type": "service", "commands": ["x"], "port": 80, "replicas": "1..2", "scaling": SCALED},
    {"type": "service", "commands": ["x"], "port": 80, "replicas": 2, "scaling": SCALED},
    {"type": "service", "commands": ["x"], "port": 80, "replicas": 1, "groups": [GROUP]},
    *(
        {"type": "service", "commands": ["x"], "port": 80, "replicas": "0..2", "scaling": {**SCALED, **more}}
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
        [GROUP], [{"count": 2, "commands": ["x"]}], [{"count": 1, "replicas": 2, "commands": ["x"]}], [{"replicas": 1}],
        [{**GROUP, "replicas": "0..2"}], [{**GROUP, "replicas": "0..2", "scaling": SCALED}], [{**GROUP, "router": {}}],
        [{**GROUP, "router": {"type": "smg"}}], [{**GROUP, "router": {"type": "dynamo"}}, {**GROUP, "name": "w"}],
        [{**GROUP, "router": {}}, {**GROUP, "router": {}, "name": "b"}], [{**GROUP, "router": {}, "replicas": 2}],
        [{**GROUP, "image": "i", "python": "3.11"}], [{**GROUP, "docker": True, "privileged": False}],
        [{**GROUP, "docker": True, "nvcc": True}], [{**GROUP, "python": 3.1}], [{"image": "i", "replicas": 1}],
    )),
    *({"type": "service", "port": 80, **top, "groups": [{**GROUP, **group}]} for top, group in (
        ({"image": "i"}, {}), ({"image": "i"}, {"image": "j"}), ({"image": "i"}, {"python": "3.11"}), ({"docker": True}, {"image": "j"}),
        ({"python": "3.11"}, {"docker": True}), ({"nvcc": True}, {"nvcc": False}), ({"nvcc": False}, {"nvcc": True}),
        ({"privileged": True}, {"privileged": True}), ({"spot_policy": "spot"}, {"spot_policy": "auto"}),
        ({"spot_policy": "spot"}, {}), ({"reservation": "r"}, {"reservation": "s"}), ({"scaling": SCALED}, {}),
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
