"""The description of this distribution for Airflow; every component reads it, so it imports nothing."""

from __future__ import annotations

from typing import Any


def get_provider_info() -> dict[str, Any]:
    """Return the provider's description as in Airflow's ``provider_info.schema.json``.

    ``conn-fields`` and ``ui-field-behaviour`` are the connection form of Airflow 3's UI. Source: Airflow
    documentation, "Creating your own providers" and "Managing Connections".
    """
    return {
        "package-name": "airflow-provider-dstack",
        "name": "dstack",
        "description": "Run GPU tasks with `dstack <https://dstack.ai/>`__.",
        "integrations": [
            {"integration-name": "dstack", "external-doc-url": "https://dstack.ai/docs/", "tags": ["ai"]}
        ],
        "operators": [
            {
                "integration-name": "dstack",
                "python-modules": [
                    "airflow_provider_dstack.operators",
                    "airflow_provider_dstack.services",
                    "airflow_provider_dstack.reaper",
                    "airflow_provider_dstack.budgets",
                    "airflow_provider_dstack.budget_approval",
                    "airflow_provider_dstack.project_secrets",
                ],
            }
        ],
        "sensors": [{"integration-name": "dstack", "python-modules": ["airflow_provider_dstack.sensors"]}],
        "hooks": [{"integration-name": "dstack", "python-modules": ["airflow_provider_dstack.hooks"]}],
        "triggers": [
            {
                "integration-name": "dstack",
                "python-modules": [
                    "airflow_provider_dstack.triggers",
                    "airflow_provider_dstack.status_trigger",
                ],
            }
        ],
        "extra-links": [
            "airflow_provider_dstack.links.DstackRunLink",
            "airflow_provider_dstack.links.DstackLogsLink",
            "airflow_provider_dstack.links.DstackMetricsLink",
            "airflow_provider_dstack.links.DstackServiceLink",
        ],
        "task-decorators": [
            {"name": "dstack", "class-name": "airflow_provider_dstack.decorators.dstack_task"}
        ],
        "config": {
            "dstack": {
                "description": "Defaults of tasks that run on dstack.",
                "options": {
                    "relay_log_again": {
                        "description": (
                            "Relay the log again in tasks that resume after a deferral. For an Airflow whose "
                            "triggerers and API server share neither a log folder nor remote logging.\n"
                        ),
                        "version_added": "0.1.0",
                        "type": "boolean",
                        "example": None,
                        "default": "False",
                    }
                },
            }
        },
        "cli": ["airflow_provider_dstack.cli.get_cli_commands"],
        "connection-types": [
            {
                "connection-type": "dstack",
                "hook-class-name": "airflow_provider_dstack.hooks.DstackHook",
                "hook-name": "dstack",
                "ui-field-behaviour": {
                    "hidden-fields": ["schema", "port"],
                    "relabeling": {"host": "Server URL", "login": "Project", "password": "Token"},
                    "placeholders": {
                        "host": "https://dstack.example.com",
                        "login": "main",
                        "password": "token of the dstack user",
                    },
                },
                "conn-fields": {
                    "project": {
                        "label": "Project (instead of the field above)",
                        "description": "Name of the dstack project; wins over the field Project above.",
                        "schema": {"type": ["string", "null"]},
                    },
                    "verify": {
                        "label": "Verify TLS certificate",
                        "description": "Turn off only for a test server.",
                        "schema": {"type": ["boolean", "null"], "default": True},
                    },
                    "ca_bundle": {
                        "label": "CA bundle",
                        "description": "Path, on the workers, of the certificates to trust.",
                        "schema": {"type": ["string", "null"]},
                    },
                    "timeout": {
                        "label": "Timeout",
                        "description": "Seconds to wait for each reply of the server.",
                        "schema": {"type": ["number", "null"], "default": 30, "minimum": 1},
                    },
                    "ui_url": {
                        "label": "Address for browsers",
                        "description": "If people reach the server at another address than the workers.",
                        "schema": {"type": ["string", "null"]},
                    },
                    "default_tags": {
                        "label": "Default tags",
                        "description": 'Tags of every run as JSON, {"team": "ml"}; false for none at all.',
                        "schema": {"type": ["string", "null"]},
                    },
                },
            }
        ],
    }
