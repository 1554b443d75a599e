"""The layers inside the providers: a module imports only modules of lower layers, also inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent / "providers"
AIRFLOW, PREFECT = "airflow_provider_dstack", "prefect_dstack"
FOLDERS = {
    AIRFLOW: ROOT / "airflow" / "src" / AIRFLOW,
    PREFECT: ROOT / "prefect" / "src" / PREFECT,
}

# The lowest layer first; modules of one layer do not import each other.
LAYERS: dict[str, list[set[str]]] = {
    AIRFLOW: [
        # Plain helpers, and what Airflow's versions differ in.
        {
            "__init__",
            "_compat",
            "_fleet_wait",
            "_lineage",
            "_parameters",
            "_setup_group",
            "_shared_polls",
            "_threads",
            "get_provider_info",
            "links",
            "utilization_plugin",
        },
        # What a run reports, and its log.
        {
            "_fallbacks",
            "_log_groups",
            "_resource_checks",
            "_run_reports",
            "_secret_sources",
            "_setup_results",
            "errors",
        },
        {"_airflow_secrets", "_log_relay"},
        {
            "_doctor",
            "_git_connection",
            "_group_fleet",
            "_kill_reason",
            "_names",
            "_stop",
            "_tags",
            "_templates",
            "_trigger_relay",
        },
        {"_resource_names"},
        # One part of a task each: its connection, its record, its submission, its result.
        {
            "_callbacks",
            "_outcome",
            "_previous_try",
            "_reap",
            "_resource_verdicts",
            "_resource_waits",
            "_runs_of_tasks",
            "hooks",
            "retry_policies",
        },
        {
            "_budget_state",
            "_commands",
            "_fleet_deletion",
            "_function_call",
            "_reap_fleets",
            "_remaining_log",
            "_secret_deletion",
            "_secret_owners",
            "_submission",
            "_task_volumes",
            "status_trigger",
            "triggers",
        },
        {"_reap_secrets", "budget_approval", "fleet_trigger", "offer_trigger", "service_trigger"},
        # A whole task: its threads, and how it is made from an operator's fields.
        {"_task_run", "budgets", "reaper"},
        {"_from_operator", "_resumed_log"},
        {"_next_step"},
        # What DAGs use, and the command line.
        {"cli", "fleet_operators", "offer_sensor", "operators", "secret_operators", "sensors", "volumes"},
        {"decorators", "fleet_group", "secret_group", "services"},
        {"fleets", "project_secrets"},
    ],
    PREFECT: [
        # Plain helpers, and the programs of a machine.
        {"_names", "_cancellation", "_secrets"},
        {
            "_artifact_content",
            "_bundle_main",
            "_bundle_secrets",
            "_checks",
            "_current_fleet",
            "_current_secrets",
            "_flow_result",
            "_flow_runs",
            "_function_result",
            "_resource_names",
            "_subflows",
            "_tags",
            "_waits",
            "retry_conditions",
            "run_dict",
        },
        # What is submitted, and where a run is shown in Prefect.
        {"_fallback_steps", "_log_relay", "_options", "_report"},
        {"_bundles", "_callbacks", "_end_reports", "_followers", "_function_options", "_live_artifacts"},
        {"_judge", "_owned_fleets", "_owned_volumes", "_submission", "flow_future"},
        # The blocks, and the clients made of them.
        {"_block_submission", "_machine_fallbacks", "cache", "credentials"},
        {"_orphaned_resources", "_stop", "_worker_evictions", "_worker_variables"},
        # One execution, and the dstack run of a worker's flow run.
        {"_job", "_orphaned_runs", "_worker_runs"},
        {"_follow"},
        # What flows and work pools use.
        {
            "_remote_function",
            "budgets",
            "deploy",
            "fleets",
            "hooks",
            "offers",
            "project_secrets",
            "reaper",
            "run_handle",
            "runs",
            "tasks",
            "volumes",
            "worker",
        },
        {"_doctor", "_remote_call", "flows", "functions", "job_block"},
        {"_commands", "decorators"},
        {"__init__", "_collection"},
        {"__main__"},
    ],
}
# Imports for annotations alone, which no process loads: the class that a module works for.
TYPES_ONLY = {
    (AIRFLOW, "_from_operator", "operators"),
    (AIRFLOW, "_next_step", "operators"),
    (AIRFLOW, "_resumed_log", "operators"),
    (PREFECT, "_block_submission", "job_block"),
    (PREFECT, "_fallback_steps", "_job"),
    (PREFECT, "_flow_runs", "decorators"),
    (PREFECT, "_function_result", "_job"),
    (PREFECT, "_remote_call", "decorators"),
    (PREFECT, "_stop", "_job"),
    (PREFECT, "run_handle", "job_block"),
}
MODULES = [
    (package, path.stem) for package, folder in FOLDERS.items() for path in sorted(folder.glob("*.py"))
]


def level(package: str, module: str) -> int:
    return next(number for number, names in enumerate(LAYERS[package]) if module in names)


def imports(package: str, tree: ast.AST, *, types: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield the modules of the package that code imports, and whether it needs them for annotations alone."""
    for node in ast.iter_child_nodes(tree):
        found: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module == package:
            files = {path.stem for path in FOLDERS[package].glob("*.py")}
            found = [alias.name if alias.name in files else "__init__" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module or ""]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        for name in found:
            if isinstance(node, ast.ImportFrom) and node.module == package:
                yield name, types
            elif name.split(".")[0] == package:
                yield [*name.split("."), "__init__"][1], types
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        yield from imports(package, node, types=types or for_types)


def source(package: str, module: str) -> str:
    return (FOLDERS[package] / f"{module}.py").read_text()


@pytest.mark.parametrize("package", LAYERS)
def test_every_module_is_in_one_layer(package: str) -> None:
    layered = [module for layer in LAYERS[package] for module in layer]
    assert sorted(layered) == sorted(module for owner, module in MODULES if owner == package)


@pytest.mark.parametrize(("package", "module"), MODULES)
def test_a_module_imports_lower_layers(package: str, module: str) -> None:
    for name, types in imports(package, ast.parse(source(package, module))):
        if types and (package, module, name) in TYPES_ONLY:
            continue
        assert level(package, name) < level(package, module), f"{module} imports {name}"


def test_each_exception_is_needed() -> None:
    for package, module, name in TYPES_ONLY:
        assert (name, True) in imports(package, ast.parse(source(package, module)))
        assert level(package, name) >= level(package, module)


@pytest.mark.parametrize(("package", "module"), MODULES)
def test_a_module_attribute_is_not_imported_by_text(package: str, module: str) -> None:
    for node in ast.walk(ast.parse(source(package, module))):
        if isinstance(node, ast.FunctionDef) and node.name == "__getattr__":
            assert "import_module" not in ast.unparse(node), f"{module}: {node.name}"
            assert "__import__" not in ast.unparse(node), f"{module}: {node.name}"


@pytest.mark.parametrize(
    "code",
    [
        f"from {AIRFLOW}.services import DstackServiceOperator",
        f"from {AIRFLOW} import services",
        f"import {AIRFLOW}.services",
        f"def act():\n    from {AIRFLOW} import services",
        f"class A:\n    def act(self):\n        if True:\n            import {AIRFLOW}.services",
    ],
)
def test_an_import_is_found_wherever_it_is(code: str) -> None:
    assert [*imports(AIRFLOW, ast.parse(code))] == [("services", False)]
