"""Each distribution imports what it declares, and declares what it imports."""

from __future__ import annotations

import pytest

from tests.declared import PACKAGES, imports_of, modules_of, project_of

EACH = pytest.mark.parametrize("folder", PACKAGES)
# Imported and not declared: what brings it, or why it may be missing. That the hosts bring it is tested in their
# environments (test_declared.py beside the other tests of each).
HOSTS_BRING = {
    "providers/airflow": {"asgiref", "attr", "cryptography", "jinja2", "sqlalchemy"},
    "providers/prefect": {"anyio", "cloudpickle", "httpx", "pydantic"},
}
NOT_DECLARED = {
    ".": {"matplotlib": "draws a chart as PNG; without it, the error says so"},
    "providers/airflow": {
        **dict.fromkeys(HOSTS_BRING["providers/airflow"], "apache-airflow"),
        "requests": "dstack-core",
        "openlineage": "lineage is reported where OpenLineage's provider is installed",
    },
    "providers/prefect": {
        **dict.fromkeys(HOSTS_BRING["providers/prefect"], "prefect"),
        "dstack_flow_secrets": "a file that is sent along with a flow",
    },
}
# Declared, and imported by no line of the sources.
NOT_IMPORTED = {
    ".": {"sniffio": "httpcore imports it, and is slow without it"},
    "providers/airflow": {"cloudpickle": "the extra is for dstack-core, which imports it"},
    "providers/prefect": {},
}
# Where the modules of an extra may be imported: without the extra, no other part needs them. The aliases of
# ~/.ssh/config are read in _code/remote.py, which warns where paramiko is missing.
ROOMS = {
    "attach": ("dstack_core/_attach/", "dstack_core/local/", "dstack_core/_code/remote.py"),
    "async": ("dstack_core/_transport/asynchronous.py",),
    "cloudpickle": ("dstack_core/_function/",),
    "local": ("dstack_core/local/",),
    "testing": ("dstack_core/testing/",),
}


def declared(folder: str) -> set[str]:
    """Return the modules of all dependencies and extras."""
    project = project_of(folder)
    extras = project.get("optional-dependencies", {})
    requirements = [*project["dependencies"], *(each for extra in extras.values() for each in extra)]
    own = project["name"]
    return {module for each in requirements if not each.startswith(own) for module in modules_of(each)}


@EACH
def test_what_is_imported_is_declared(folder: str) -> None:
    assert set(imports_of(folder)) - declared(folder) <= set(NOT_DECLARED[folder])


@EACH
def test_what_is_declared_is_imported(folder: str) -> None:
    assert declared(folder) - set(imports_of(folder)) - {"dstack_report"} == set(NOT_IMPORTED[folder])


@EACH
def test_no_exception_is_left_over(folder: str) -> None:
    assert set(NOT_DECLARED[folder]) <= set(imports_of(folder)) - declared(folder)


def test_what_belongs_to_an_extra_is_imported_in_its_room_alone() -> None:
    extras = project_of(".")["optional-dependencies"]
    assert set(ROOMS) == set(extras)
    imported = imports_of(".")
    for extra, requirements in extras.items():
        for each in requirements:
            for module in modules_of(each):
                files = {str(path) for path in imported.get(module, ())}
                assert module == "dstack_core" or all(name.startswith(ROOMS[extra]) for name in files), module


def test_an_import_in_a_function_counts() -> None:
    assert any(path.name == "_threads.py" for path in imports_of("providers/airflow")["asgiref"])
    assert "cloudpickle" in imports_of(".")  # by its name in a text
    assert "yaml" in imports_of(".")
    assert "json" not in imports_of(".")
