"""Which values of env are masked: by their names, and by where Airflow has them from."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import jinja2
import pytest
from airflow.sdk import DAG

from airflow_provider_dstack._from_operator import submit_arguments
from airflow_provider_dstack._secret_sources import AIRFLOWS_WORDS, reads_secret
from airflow_provider_dstack.operators import DstackRunOperator
from airflow_provider_dstack.services import DstackServiceOperator
from dstack_core import ConfigurationError, Service, Task
from dstack_core.integration import is_secret_name


def parsed(template: str) -> Any:
    return jinja2.Environment(autoescape=True).parse(template)


SECRET = [
    "{{ conn.db.password }}",
    "{{ conn['db'].password | urlencode }}",
    "{{ conn.get('db').get_password() }}",
    "{{ conn.db.get_uri() }}",
    "{{ conn.db.extra }}",
    "{{ conn.db.extra_dejson.api_key }}",
    "{{ conn.db.extra_dejson['clientSecret'] }}",
    "{{ conn.db }}",
    "{{ conn[params.which].password }}",
    "postgres://{{ conn.db.login }}:{{ conn.db.password }}@{{ conn.db.host }}",
    "{% set c = conn.db %}{{ c.password }}",
    "{{ var.value.hf_token }}",
    "{{ var.value.get('my_secret', 'none') }}",
    "{{ var.json.database.password }}",
    "{{ var.value[params.name] }}",
    "{{ var.value.mytokens }}",
    "{{ 'x' ~ var.value.api_key }}",
    "{% if params.a %}{{ var.value.wandb_api_key }}{% endif %}",
]
PLAIN = [
    "train",
    "{{ conn.db.host }}:{{ conn.db.port }}/{{ conn.db.schema }}",
    "{{ conn.db.login }}",
    "{{ conn.db.extra_dejson.region }}",
    "{{ var.value.stage }}",
    "{{ var.value.get('stage', 'train') }}",
    "{{ var.json.training.epochs }}",
    "{{ ds }} {{ params.model }} {{ ti.xcom_pull(task_ids='a') }}",
]


@pytest.mark.parametrize("template", SECRET)
def test_a_template_that_reads_a_secret_is_found(template: str) -> None:
    assert reads_secret(parsed(template))


@pytest.mark.parametrize("template", PLAIN)
def test_a_template_that_reads_no_secret_stays_readable(template: str) -> None:
    assert not reads_secret(parsed(template))


def test_the_words_are_those_of_this_airflow() -> None:
    homes = ("airflow.sdk._shared.secrets_masker", "airflow.sdk.execution_time.secrets_masker")
    for home in homes:
        try:
            words = import_module(home).DEFAULT_SENSITIVE_FIELDS
        except (ImportError, AttributeError):
            continue
        assert words <= set(AIRFLOWS_WORDS)
        return
    pytest.fail("this Airflow has its words at another place")


def test_whole_words_of_airflows_are_secret_in_env_too() -> None:
    shown = {word for word in AIRFLOWS_WORDS if not is_secret_name(word)}
    # An account and a proxy are secret if their value holds a login.
    assert shown == {"proxies", "proxy", "service_account"}


class Connection:
    """A connection, as a template sees it."""

    password, login, host = "hub-pass-77", "robot-of-hub", "hub.example.com"


CONTEXT: Any = {
    "conn": {"hub": Connection()},
    "var": {"value": {"hf_token": "hf-token-88", "stage": "tuning"}},
}
VALUES = {
    "WORD": "{{ conn.hub.password }}",
    "LICENSE": "license-99",
    "HF": "{{ var.value.hf_token }}",
    "STAGE": "{{ var.value.stage }}",
    "LOGIN": "{{ conn.hub.login }}",
    "API_KEY": "literal-66",
    "EPOCHS": "10000",
}
YAML = "type: task\ncommands: [x]\nenv:\n" + "".join(
    f"  - {name}={value}\n" for name, value in VALUES.items()
)
FORMS: dict[str, dict[str, Any]] = {
    "dict": {"configuration": {"type": "task", "commands": ["x"], "env": VALUES}},
    "list": {
        "configuration": {
            "type": "task",
            "commands": ["x"],
            "env": [f"{name}={value}" for name, value in VALUES.items()],
        }
    },
    "model": {"configuration": Task(commands=["x"], env=VALUES)},
    "yaml": {"configuration": YAML},
    "env": {"configuration": {"type": "task", "commands": ["x"], "env": list(VALUES)}, "env": VALUES},
}


def rendered(form: str, **more: Any) -> DstackRunOperator:
    task = DstackRunOperator(task_id="train", **FORMS[form], **more)
    task.render_template_fields(CONTEXT)
    return task


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("mask_env", "found"),
    [
        ("secrets", {"hub-pass-77", "hf-token-88", "literal-66"}),
        ("all", {"hub-pass-77", "hf-token-88", "literal-66", "license-99", "tuning", "robot-of-hub"}),
        # Airflow itself has these as secrets.
        ("none", {"hub-pass-77", "hf-token-88"}),
        (["LICENSE"], {"hub-pass-77", "hf-token-88", "literal-66", "license-99"}),
    ],
)
def test_what_is_masked_in_every_form_of_env(form: str, mask_env: Any, found: set[str]) -> None:
    task = rendered(form, mask_env=mask_env)
    assert set(task.secret_texts()) == found
    assert task.secret_names() == ["HF", "WORD"]


def test_an_environment_that_is_one_template_is_secret_as_a_whole_if_it_reads_a_secret() -> None:
    task = DstackRunOperator(
        task_id="train",
        configuration='type: task\ncommands: [x]\nenv: {{ {"A": conn.hub.password, "B": "bright"} | tojson }}\n',
    )
    task.render_template_fields(CONTEXT)
    assert "hub-pass-77" in set(task.secret_texts())


def test_names_that_a_site_calls_sensitive_are_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__SENSITIVE_VAR_CONN_NAMES", "licen, epo")
    task = rendered("dict")
    assert task.secret_names() == ["EPOCHS", "HF", "LICENSE", "WORD"]
    assert "license-99" in set(task.secret_texts())
    assert reads_secret(parsed("{{ var.value.license }}"))


@pytest.mark.parametrize("value", ["secret", None, True, {"A": "b"}, [5], [""]])
def test_a_wrong_value_is_refused_when_the_dag_is_parsed(value: Any) -> None:
    with pytest.raises(ValueError, match=r"mask_env: expected .*all"):
        DstackRunOperator(task_id="train", configuration={"type": "task"}, mask_env=value)


def test_a_service_has_the_option_too() -> None:
    service = DstackServiceOperator(task_id="serve", configuration={"type": "service"}, mask_env=("B", "A"))
    assert service.mask_env == ["A", "B"]


def test_only_names_that_the_run_has_unless_they_are_a_default() -> None:
    def arguments(task: DstackRunOperator) -> Any:
        return submit_arguments(task, CONTEXT)

    assert arguments(rendered("list", mask_env=["license"]))
    with pytest.raises(ConfigurationError, match=r"mask_env: .* got 'LICENCE'. Did you mean 'LICENSE'\?"):
        arguments(rendered("list", mask_env=["LICENCE"]))
    with DAG("defaults", schedule=None, default_args={"mask_env": ["LICENCE"]}):
        task = DstackRunOperator(task_id="train", configuration={"type": "task", "commands": ["x"]})
        service = DstackServiceOperator(task_id="serve", configuration=Service(port=80, commands=["x"]))
    assert task.mask_env == service.mask_env == ["LICENCE"]
    assert arguments(task)
    assert arguments(service)
