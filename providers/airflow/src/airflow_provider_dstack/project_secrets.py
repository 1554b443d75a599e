"""Set secrets of Airflow as project secrets of dstack, and delete them: for setup and teardown."""

from __future__ import annotations

from airflow_provider_dstack.secret_group import DstackSecretsGroup, dstack_secrets
from airflow_provider_dstack.secret_operators import DstackDeleteSecretsOperator, DstackSecretsOperator

__all__ = ["DstackDeleteSecretsOperator", "DstackSecretsGroup", "DstackSecretsOperator", "dstack_secrets"]
