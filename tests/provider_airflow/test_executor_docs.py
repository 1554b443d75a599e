"""The image, the settings and the pod template of docs/how-to/executors.md, read as Airflow reads them."""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.blocks import Block, blocks

_SIGTERM_TO_SIGKILL_SECONDS = 30


@pytest.mark.parametrize("block", blocks("dockerfile"), ids=str)
def test_an_image_is_built_on_airflows_and_has_the_provider(block: Block) -> None:
    base, *commands = block.code.splitlines()
    assert re.fullmatch(r"FROM apache/airflow:\d+\.\d+\.\d+", base)
    assert commands == ["RUN pip install airflow-provider-dstack"]


@pytest.mark.parametrize("block", blocks("ini"), ids=str)
def test_settings_exist_and_have_values_that_airflow_reads(
    block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("airflow.providers.celery")
    from airflow.configuration import conf
    from airflow.providers.celery.executors.default_celery import get_default_celery_config

    given = configparser.ConfigParser()
    given.read_string(block.code)
    names = [(section, key, value) for section in given.sections() for key, value in given[section].items()]
    assert names
    for section, key, value in names:
        if section != "celery_broker_transport_options":
            assert conf.has_option(section, key), (section, key)
            assert int(value) > 0
        monkeypatch.setenv(f"AIRFLOW__{section}__{key}".upper(), value)
    monkeypatch.setenv("AIRFLOW__CELERY__BROKER_URL", "redis://127.0.0.1:9/0")
    config = get_default_celery_config(conf)
    assert config["worker_concurrency"] == given.getint("celery", "worker_concurrency")
    timeout = config["broker_transport_options"]["visibility_timeout"]
    assert timeout == given.getint("celery_broker_transport_options", "visibility_timeout")


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_a_pod_template_makes_the_pod_that_it_describes(block: Block, tmp_path: Path) -> None:
    pytest.importorskip("airflow.providers.cncf.kubernetes")
    from airflow.providers.cncf.kubernetes.pod_generator import PodGenerator

    path = tmp_path / "pod.yaml"
    path.write_text(block.code)
    template = PodGenerator.deserialize_model_file(str(path))
    # A key that Kubernetes does not know is not in the model.
    assert as_json(template) == yaml.safe_load(block.code)
    pod = PodGenerator.construct_pod(
        dag_id="train_model",
        task_id="train",
        pod_id="train-1",
        try_number=1,
        kube_image="",
        date=None,
        args=["python", "-m", "airflow.sdk.execution_time.execute_workload", "--json-string", "{}"],
        pod_override_object=None,
        base_worker_pod=template,
        namespace="airflow",
        scheduler_job_id="1",
        run_id="manual",
    )
    (container,) = pod.spec.containers
    given = template.spec.containers[0]
    assert (container.name, container.image, container.args[0]) == ("base", given.image, "python")
    assert {one.name for one in container.env} >= {"AIRFLOW_CONN_DSTACK_DEFAULT"}
    assert pod.spec.termination_grace_period_seconds > _SIGTERM_TO_SIGKILL_SECONDS
    assert pod.spec.restart_policy == "Never"
    assert set(template.metadata.annotations) <= set(pod.metadata.annotations)
    assert as_json(pod)["kind"] == "Pod"


def as_json(model: Any) -> Any:
    from kubernetes.client import ApiClient  # type: ignore[import-untyped]  # it has no types

    return ApiClient().sanitize_for_serialization(model)
