"""Values of a configuration, in the forms users write and in wrong forms."""

from __future__ import annotations

from typing import Any

DURATIONS: list[Any] = [0, 1, 90, -1, -5, 1.5, "90", "90s", "5m", "2h", "1d", "1w", "2 h", " 2h", "2h ", "off", "on", "soon", "-3", True, False, [], {}]  # fmt: skip
MEMORIES: list[Any] = [0, 1, 24, 1.5, "24", "24GB", "24gb", "24 GB", "512MB", "1TB", "1.5TB", "24GB..", "..24GB", "16GB..24GB", "24GB..16GB", "..", "1..2..3", "24GiB", "big", -1, True, [], {}, {"min": 8}, {"max": "8GB"}, {"min": 8, "max": 4}, {"min": None, "max": None}, {"least": 8}]  # fmt: skip
COUNTS: list[Any] = [0, 1, 2, 2.0, 2.5, "2", "2..", "..2", "1..4", "4..1", "..", "x", -1, True, [], {}, {"min": 1}, {"min": "1", "max": 2}, {"max": 3}, {"least": 1}]  # fmt: skip
TEXTS: list[Any] = ["x", "", 1, 3.5, True, [], {}, "a:b"]
SWITCHES: list[Any] = [True, False, "true", "no", 1, 0, 2, "x", [], {}]
GPUS: list[Any] = [
    *(0, 1, 8, "1", "8", "1..4", "2..", 1.5, True, "A100", "a100", "A100,H100", "A100,", ",A100", "A100:2"),
    *(
        "A100:40GB:2",
        "A100:40GB..:2..4",
        "24GB",
        "24GB..",
        "24GB..80GB:2",
        "nvidia",
        "NVIDIA:24GB",
        "amd:MI300X",
    ),
    *("tpu:v5e-8", "tpu", "tt", "tt:n150", "amd", "intel:Gaudi3", "A100:", ":A100", "", "A100:H100", "2:3"),
    *("24GB:48GB", "A100 : 2", "A100:80GB:8:nvidia", "nvidia:amd", "v5litepod-8", "x:y:z"),
    *({"name": "A100"}, {"name": ["A100", "H100"]}, {"name": "A100,H100"}, {"name": []}, {"name": 100}),
    *({"name": "tpu-v5e"}, {"vendor": "nvidia"}, {"vendor": "TPU"}, {"vendor": "tt"}, {"vendor": "x"}),
    *({"vendor": 1}, {"names": ["A100"]}, {"compute_capability": 8.0}, {"compute_capability": "8.6"}),
    *({"compute_capability": [8, 6]}, {"compute_capability": 8}, {"compute_capability": "8"}, {}, [], None),
    *({"compute_capability": None}, {"memory": None}, {"vendor": None, "name": None}),
    *({"count": value} for value in COUNTS),
    *({"memory": value} for value in MEMORIES),
    *({"total_memory": value} for value in MEMORIES),
]
CPUS: list[Any] = [
    *COUNTS,
    *(
        "x86",
        "arm",
        "ARM",
        "x86:4",
        "arm:8..",
        "4:x86",
        "x86:arm",
        "4:8",
        "x86:",
        ":4",
        "sparc:2",
        "x86 : 4..",
    ),
    *({"arch": "x86"}, {"arch": "X86", "count": 4}, {"arch": "sparc"}, {"count": None}, {"cores": 4}, None),
]
RESOURCES: list[Any] = [
    *({"gpu": value} for value in GPUS),
    *({"cpu": value} for value in CPUS),
    *({"memory": value} for value in MEMORIES),
    *({"shm_size": value} for value in [*MEMORIES, None]),
    *({"disk": value} for value in [*MEMORIES, None]),
    *({"disk": {"size": value}} for value in MEMORIES),
    *({}, [], None, "24GB..", {"gpus": 1}, {"memory": None}),
]
RETRIES: list[Any] = [
    *(
        True,
        False,
        None,
        "yes",
        1,
        2,
        {},
        {"duration": "1h"},
        {"duration": -5},
        {"duration": "x"},
        [],
        "error",
    ),
    *({"on_events": []}, {"on_events": ["error"]}, {"on_events": ["bad-luck"]}, {"on_events": "error"}),
    *({"on_events": ["no-capacity", "interruption"], "duration": 60}, {"limit": 1}),
]
PORTS: list[Any] = [
    *(
        8080,
        "8080",
        "8080:80",
        "*:80",
        "x:y",
        "80:",
        ":80",
        "*",
        "",
        0,
        65536,
        "70000",
        80.0,
        True,
        None,
        [],
        "80:90:100",
    ),
    *({"local_port": 1, "container_port": 2}, {"container_port": 2}, {"local_port": 1}, {"port": 1}),
    *({"local_port": None, "container_port": "80"}, {"local_port": 0, "container_port": 1}),
]
ENVS: list[Any] = [
    *(
        {},
        [],
        {"A": "1"},
        {"A": 1},
        {"A": 1.5},
        {"A": True},
        {"A": None},
        {"A": []},
        {"1A": "2"},
        {"A B": "c"},
    ),
    *(
        ["A=1"],
        ["A=1", "B=x=y"],
        ["A="],
        ["A"],
        ["A", "A"],
        ["A=1", "A=2"],
        ["A=1", "A"],
        ["A = 1"],
        ["1A=2"],
    ),
    *(
        ["A=1\n2"],
        ["A-B=1"],
        [1],
        [None],
        ["=1"],
        "A=1",
        1,
        None,
        {"A": {"key": "A"}},
        {"A": {"key": "A", "x": 1}},
    ),
]
REFERENCES: list[Any] = ["rig", "other/rig", "a/b/c", "/rig", "rig/", "", {"name": "rig"}, {"project": "p", "name": "rig"}, {"fleet": "rig"}, 1, None, True]  # fmt: skip
MOUNTS: list[Any] = [
    *(
        "vol:/data",
        "/host:/data",
        "vol:data",
        "vol:/../data",
        "vol",
        "a:b:c",
        ":/data",
        "vol:",
        "a/b:/c",
        1,
        None,
    ),
    *({"name": "vol", "path": "/data"}, {"name": ["a", "b"], "path": "/data/"}, {"name": "vol"}),
    *({"instance_path": "/host", "path": "/data"}, {"instance_path": "host", "path": "/data"}),
    *(
        {"instance_path": "/host", "path": "/data", "optional": True},
        {"name": "v", "instance_path": "/h", "path": "/d"},
    ),
    *({"name": [], "path": "/d"}, {"name": "v", "path": "//d"}, {"name": "v", "path": "/"}, "vol:/"),
]
FILES: list[Any] = [
    *("a.txt", "a.txt:/b", "a:b:c", "C:\\x:/y", "c:/x:/y", "C:\\x", "a:C:/x", "", ":", 1, None, {}),
    *(
        {"local_path": "a", "path": "b"},
        {"local_path": "a"},
        {"local_path": "a", "path": "C:\\b"},
        {"path": "b"},
    ),
]
REPOS: list[Any] = [
    *(
        ".",
        ".:/x",
        "https://host/a/b",
        "https://host/a/b:/x",
        "git@host:a/b.git",
        "git@host:a/b.git:/x",
        "C:\\r:/x",
    ),
    *(
        "a:b:c",
        "",
        "ssh://git@host/a",
        "https://host:8080/a",
        1,
        None,
        {},
        {"local_path": "."},
        {"url": "https://h/a"},
    ),
    *(
        {"local_path": ".", "url": "https://h/a"},
        {"local_path": ".", "path": "~/x"},
        {"local_path": ".", "path": "~u/x"},
    ),
    *(
        {"url": "u", "branch": "b", "hash": "h", "if_exists": "skip"},
        {"url": "u", "if_exists": "never"},
        {"url": ""},
    ),
]
