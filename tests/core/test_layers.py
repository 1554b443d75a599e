"""The rooms, that is the packages and modules of dstack_core, and their order: which may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.walks import count_lines

ROOT = Path(__file__).parent.parent.parent
CORE = ROOT / "dstack_core"

# The flows of the two side rooms are rooms of their own: pure as ``_flow`` is, and above the rest of the room.
SIDE_FLOWS = {
    "_attach.wait": {"errors", "models", "_wire", "_flow"},
    "_attach.follow_live_log": {"errors", "models", "_wire", "_flow"},
    "_code.deliver": {"errors", "models", "_wire", "_flow", "_code"},
}
# Each room may import the rooms in its set and itself, and nothing else of dstack_core.
ROOMS = {
    "errors": set(),
    "clock": set(),
    "models": {"errors"},
    "_wire": {"errors", "models"},
    "_flow": {"errors", "models", "_wire"},
    "_transport": {"errors", "_wire.http_messages"},
    "_drive": {"clock", "models", "_wire.http_messages", "_flow"},
    "_adrive": {"clock", "models", "_wire.http_messages", "_flow", "_drive"},
    "_attach": {"errors", "_wire.attach"},
    "_code": {"errors", "models", "_wire.code", "_attach.keys", "_attach.key_text", "_attach.extra"},
    **SIDE_FLOWS,
    "_report": {"errors", "models", "_wire.code"},
    "_function": {"errors", "models", "_code.ignored"},
    "_function_runs": {
        *("errors", "models", "_wire.runs", "_wire.http_messages", "_flow", "_drive", "_operations"),
        *("_run_base", "_function", "configurations"),
    },
    "functions": {
        *(
            "errors",
            "models",
            "_wire.runs",
            "_transport",
            "_drive",
            "_operations",
            "_function",
            "_function_runs",
        ),
        *("configurations", "run"),
    },
    "aio_functions": {
        *("errors", "models", "_wire.runs", "_transport", "_adrive", "_operations", "_function"),
        *("_function_runs", "configurations", "aio_run"),
    },
    "config": {"errors", "models"},
    "configurations": {"errors", "models"},
    "_operations": {
        "clock",
        "errors",
        "models",
        "_wire",
        "_flow",
        "_attach",
        "_code",
        "_report",
        "configurations",
    },
    "_resource_operations": {
        "errors",
        "models",
        "_wire",
        "_flow",
        "_attach",
        "_operations",
        "configurations",
    },
    "resource_collections": {
        *("models", "_transport", "_drive", "_operations", "_resource_operations", "configurations"),
    },
    "aio_resource_collections": {
        *("models", "_transport", "_adrive", "_operations", "_resource_operations", "configurations"),
    },
    "_client_base": {"models", "_wire", "_flow", "_transport", "_operations", "_attach", "_code", "config"},
    "_run_base": {"models", "_wire", "_flow", "_operations", "_attach"},
    "run": {"clock", "errors", "models", "_flow", "_transport", "_drive", "_operations", "_run_base"},
    "aio_run": {
        *(
            "clock",
            "errors",
            "models",
            "_wire.runs",
            "_flow",
            "_transport",
            "_adrive",
            "_operations",
            "_run_base",
            "_shared",
        ),
    },
    "collections": {"models", "_transport", "_drive", "_operations"},
    "aio_collections": {"models", "_transport", "_adrive", "_operations"},
    "client": {
        *("models", "_wire", "_transport", "_drive", "_operations", "_client_base", "configurations", "run"),
        *("collections", "functions", "resource_collections", "_resource_operations"),
    },
    "aio": {
        *("models", "_wire", "_transport", "_adrive", "_operations", "_client_base", "configurations"),
        *("aio_run", "aio_collections", "aio_functions", "aio_resource_collections", "_resource_operations"),
    },
    "_shared": {
        *(
            "clock",
            "errors",
            "_wire.lookups",
            "_wire.http_messages",
            "_wire.runs",
            "_flow.steps",
            "_transport",
        )
    },
    "aio_shared": {"_shared", "_transport", "aio"},
    "integration": {
        *(
            "clock",
            "errors",
            "models",
            "_wire.runs",
            "_wire.versions",
            "_flow",
            "_drive",
            "_adrive",
            "_operations",
            "_attach.keys",
            "_attach.extra",
            "_code.content",
            "_run_base",
            "_function",
            "config",
            "configurations",
            "client",
            "aio",
            "run",
            "aio_run",
        )
    },
    "local": {"clock", "client"},
    "_command": {"errors", "models", "_wire.reports", "_attach", "client", "run", "integration"},
    "testing": {"client", "local"},
    "__main__": {"_command"},
}
HOSTS = {"airflow", "prefect", "airflow_provider_dstack", "prefect_dstack", "dstack"}
FILES = sorted(path for path in CORE.rglob("*.py") if path != CORE / "__init__.py")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module or ""
            names |= (
                {f"{module}.{alias.name}" for alias in node.names} if module == "dstack_core" else {module}
            )
        elif isinstance(node, ast.ImportFrom):
            names.add("relative import")
    return names


def room_of(path: Path) -> str:
    parts = path.relative_to(CORE).with_suffix("").parts
    return module if (module := ".".join(parts)) in SIDE_FLOWS else parts[0]


def test_every_file_belongs_to_a_room() -> None:
    assert {room_of(path) for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_in_their_order(path: Path) -> None:
    room = room_of(path)
    for name in imported(path):
        assert name.split(".")[0] not in HOSTS, f"{path} imports the host {name}"
        assert name != "relative import", f"{path}: imports are absolute"
        if not name.startswith("dstack_core."):
            continue
        target = name.removeprefix("dstack_core.")
        allowed = {room} | ROOMS[room]
        assert target not in SIDE_FLOWS or room not in ("_attach", "_code"), f"{path} imports {name}"
        assert any(target == item or target.startswith(f"{item}.") for item in allowed), (
            f"{path} imports {name}"
        )


@pytest.mark.parametrize("name", ["requests", "httpx", "paramiko", "socket", "asyncio", "time", "os"])
@pytest.mark.parametrize("room", ["_wire", "_flow", "models", *SIDE_FLOWS])
def test_pure_rooms_do_no_io(room: str, name: str) -> None:
    for path in [path for path in FILES if room_of(path) == room or (CORE / room) in path.parents]:
        assert name not in {module.split(".")[0] for module in imported(path)}, f"{path} imports {name}"


def test_providers_use_public_names_only() -> None:
    for path in (ROOT / "providers").rglob("src/**/*.py"):
        for name in imported(path):
            if name.startswith("dstack_core"):
                parts = name.split(".")
                assert parts[:2] in (["dstack_core"], ["dstack_core", "local"]) or (
                    len(parts) == 2 and not parts[1].startswith("_")
                ), f"{path} imports {name}"


def test_no_folder_shadows_a_host_package() -> None:
    assert not (ROOT / "providers" / "__init__.py").exists()
    assert not (ROOT / "providers" / "airflow" / "__init__.py").exists()
    assert not {"airflow", "prefect", "dstack"} & {path.name for path in (ROOT / "tests").iterdir()}


def test_a_transport_is_small_and_knows_no_route() -> None:
    for path in (CORE / "_transport").glob("*.py"):
        text = path.read_text()
        assert "/api/" not in text
        code, _ = count_lines(text)
        assert code <= 90, path


def test_versions_are_compared_in_the_wire_room_alone() -> None:
    for path in FILES:
        if room_of(path) not in ("_wire", "local"):
            assert "server_version" not in path.read_text(), path


@pytest.mark.parametrize("name", ["paramiko", "cryptography", "psutil", "websockets"])
def test_what_only_attaching_needs_is_loaded_by_attaching(name: str) -> None:
    code = f"import sys, dstack_core as d; d.Client; d.AsyncClient; sys.exit({name!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["asyncio", "httpx", "yaml", "pathspec"])
def test_what_a_plain_client_does_not_use_is_not_loaded(name: str) -> None:
    code = (
        "import sys, dstack_core as d; d.Client(server_url='http://x', project_name='x', user_token='x'); "
        f"d.Task(commands=['true']); sys.exit({name!r} in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
