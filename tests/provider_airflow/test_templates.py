"""Which texts of a configuration are templates, and how they are rendered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG

from airflow_provider_dstack._compat import AirflowFailException
from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core import ConfigurationError, Task
from dstack_core.local import LocalServer
from tests.provider_airflow.support import DagRunner, paths

NATIVE = pytest.mark.parametrize("native", [False, True], ids=["text", "native"])


def rendered(
    configuration: Any, *, native: bool = False, dag: dict[str, Any] | None = None, **arguments: Any
) -> Any:
    """Return the operator once its templates are rendered; ``dag`` are arguments of its DAG."""
    with DAG("templates", schedule=None, render_template_as_native_obj=native, **(dag or {})):
        task = DstackRunOperator(task_id="train", configuration=configuration, **arguments)
    context: Any = {
        "word": "hi",
        "number": 3,
        "version": "3.10",
        "names": ["a", "b"],
        "flag": True,
        "empty": None,
    }
    task.render_template_fields(context)
    return task


@NATIVE
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a=(1 2); echo ${#a[@]} {{ word }}", "a=(1 2); echo ${#a[@]} hi"),
        ("echo ${#HOME}", "echo ${#HOME}"),
        ("x {# a comment #} y", "x  y"),
        ("python train.py ${{ run.args }}", "python train.py ${{ run.args }}"),
        ("echo ${{ groups[0].nodes[0].IP_ADDRESS }}", "echo ${{ groups[0].nodes[0].IP_ADDRESS }}"),
        ("echo $${{ word }}", "echo $${{ word }}"),
        ("echo $${{ a }} ${#b} {{ '}}' }}", "echo $${{ a }} ${#b} }}"),
        ("{% raw %}${#a} {{.Names}} ${{ env.B }}{% endraw %} {{ word }}", "${#a} {{.Names}} ${{ env.B }} hi"),
        ("{%- raw -%} ${#a} {%- endraw -%}", "${#a}"),
        ("{{ '${#a}' }}", "${#a}"),
    ],
)
def test_what_the_shell_and_dstack_fill_in_is_left_to_them(given: str, expected: str, native: bool) -> None:
    task = rendered({"type": "task", "commands": [given]}, native=native)
    assert task.configuration["commands"] == [expected]


def test_other_delimiters_of_the_dag_are_respected() -> None:
    own = {"variable_start_string": "[[", "variable_end_string": "]]", "trim_blocks": True}
    text = "echo [[ word ]] ${{ secrets.a }}\necho ${#a} {{.Names}}\n"
    task = rendered({"type": "task", "commands": [text]}, dag={"jinja_environment_kwargs": own})
    assert task.configuration["commands"] == [text.replace("[[ word ]]", "hi").rstrip("\n")]


@pytest.mark.parametrize(
    ("configuration", "where"),
    [
        (
            {"type": "task", "commands": ["true", "docker ps --format '{{.Names}}'"]},
            "configuration.commands[1], line 1: ",
        ),
        ({"type": "task", "commands": ["echo\necho {% if %}"]}, "configuration.commands[0], line 2: "),
        (Task(commands=["echo {{ word"]), "configuration.commands[0], line 1: "),
        ("type: task\ncommands:\n  - docker ps --format '{{.Names}}'\n", "configuration, line 3: "),
    ],
    ids=["dict", "second line", "model", "text"],
)
def test_a_template_that_cannot_be_parsed_is_named_with_its_line(
    configuration: Any, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(AirflowFailException) as caught:
        rendered(configuration)
    message = str(caught.value)
    assert message.startswith(where)
    assert "between {% raw %} and {% endraw %}" in message
    assert "Exception rendering Jinja template" not in caplog.text


def test_a_template_in_a_secret_that_cannot_be_parsed_shows_nothing_of_it() -> None:
    with pytest.raises(AirflowFailException) as caught:
        rendered({"type": "task", "commands": ["true"], "env": {"KEY": "{{ swordfish sesame"}})
    assert str(caught.value).startswith("configuration.env.KEY, line 1: ")
    assert "sesame" not in str(caught.value)


def test_a_template_in_a_file_that_cannot_be_parsed_is_named_with_its_file(
    dag_runner: DagRunner, server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    path = dag_runner.folder / "names.dstack.yml"
    path.write_text("type: task\ncommands:\n- docker ps --format '{{.Names}}'\n")
    ended = dag_runner.run("configuration='names.dstack.yml'")
    output = capfd.readouterr().out
    assert ended.task_state == "failed"
    assert "configuration, line 3: " in output
    assert output.count("{% endraw %}") == 1
    assert paths(server, "/runs/apply") == []


@NATIVE
def test_text_that_ends_like_a_path_is_text(native: bool) -> None:
    text = "type: task\ncommands:\n- python train.py {{ word }}.yml"
    assert rendered(text, native=native).configuration == text.replace("{{ word }}", "hi")


def test_a_file_that_ends_like_a_path_is_read(dag_runner: DagRunner, server: LocalServer) -> None:
    (dag_runner.folder / "odd.yml").write_text("type: task\ncommands:\n- test -n x.yml")
    assert dag_runner.run("configuration='odd.yml', poll_interval=0.2").task_state == "success"


def test_only_the_configuration_names_a_file_to_read(dag_runner: DagRunner, server: LocalServer) -> None:
    dag = dag_runner.load(
        "from airflow.sdk import DAG, task\n"
        "with DAG('no_files', schedule=None) as dag:\n"
        "    @task.dstack(commands=['cat there.yml'])\n"
        "    def answer():\n"
        "        return 42\n"
        "    answer()\n"
    )
    (dag_runner.folder / "there.yml").write_text("read")
    dag.resolve_template_files()
    assert dag.get_task("answer").commands == ["cat there.yml"]


def test_native_rendering_leaves_text_text() -> None:
    task = rendered(
        {
            "type": "task",
            "python": "{{ version }}",
            "commands": ["{{ number }}", "['a', 'b']", "{{ names }}"],
            "env": {"PLAIN": "007", "ONE": "{{ number }}", "FLAG": "{{ flag }}", "LIST": "[1, 2]"},
            "image": "{{ empty }}",
            "nodes": "{{ number }}",
            "tags": {"run": "1e5"},
        },
        native=True,
        run_name="{{ number }}",
        args=["{{ version }}", "{{ flag }}"],
        env={"A": "{{ version }}"},
    )
    assert (task.args, task.env) == (["3.10", "True"], {"A": "3.10"})
    assert task.configuration == {
        "type": "task",
        "python": "3.10",
        "commands": ["3", "['a', 'b']", "['a', 'b']"],
        "env": {"PLAIN": "007", "ONE": "3", "FLAG": "True", "LIST": "[1, 2]"},
        "image": None,
        "nodes": 3,
        "tags": {"run": "1e5"},
    }
    assert task.run_name == "3"


def test_native_rendering_gives_lists_and_dicts_where_one_is_expected() -> None:
    given = {"type": "task", "commands": "{{ names }}", "env": "{{ {'A': number} }}"}
    task = rendered(given, native=True, backends="{{ names }}")
    assert task.configuration == {"type": "task", "commands": ["a", "b"], "env": {"A": 3}}
    assert task.backends == ["a", "b"]
    whole = rendered("{{ {'type': 'task', 'commands': names} }}", native=True)
    assert whole.configuration == {"type": "task", "commands": ["a", "b"]}


def test_native_rendering_does_not_read_yaml_as_python() -> None:
    text = '{"type": "task", "python": 3.10, "commands": ["{{ word }}"]}'
    task = rendered(text, native=True)
    assert task.configuration == text.replace("{{ word }}", "hi")
    model = rendered(Task(python="{{ version }}", commands=["1e5"]), native=True)
    assert model.configuration == Task(python="3.10", commands=["1e5"])


def test_arguments_of_a_function_are_rendered_natively_as_airflow_does(
    dag_runner: DagRunner, server: LocalServer
) -> None:
    dag = dag_runner.load(
        "from airflow.sdk import DAG, task\n"
        "with DAG('native_arguments', schedule=None, render_template_as_native_obj=True) as dag:\n"
        "    @task.dstack(env={'TEXT': '007'}, poll_interval=0.2)\n"
        "    def answer(numbers):\n"
        "        import os\n"
        "        return [numbers, os.environ['TEXT']]\n"
        "    answer('[1, {{ 1 + 1 }}]')\n"
    )
    try:
        (ti,) = dag.test().get_task_instances()
    finally:
        Path(dag.fileloc).unlink()
    assert ti.xcom_pull(task_ids="answer") == [[1, 2], "007"]


@NATIVE
def test_a_date_that_a_triggered_run_lacks_fails_at_once_with_alternatives(native: bool) -> None:
    with pytest.raises(AirflowFailException) as caught:
        rendered({"type": "task", "commands": ["echo {{ ds }}"]}, native=native)
    assert str(caught.value) == (
        "configuration: expected a DAG run with a logical date for 'ds', got one that was triggered without. "
        "Use {{ dag_run.run_after | ds }} or {{ run_id }}."
    )


def test_undefined_names_fail_natively_too() -> None:
    with pytest.raises(Exception, match="'nothing' is undefined"):
        rendered({"type": "task", "commands": ["{{ nothing }}"]}, native=True)


_UPSTREAM = """
@task
def words() -> dict:
    return {"name": "hi", "number": 3}

found = words()
"""


def test_the_result_of_a_task_is_filled_into_a_dict(dag_runner: DagRunner, server: LocalServer) -> None:
    ran = dag_runner.run_tasks(
        f"""{_UPSTREAM}
what = {{"type": "task", "commands": ['test "$NAME" = hi', 'test "$NUMBER" = 3'],
         "env": {{"NAME": found["name"], "NUMBER": found["number"], "KEY": "literal-sesame"}}}}
DstackRunOperator(task_id="train", configuration=what, poll_interval=0.2)
"""
    )
    assert ran.tasks == {"words": "success", "train": "success"}


def test_the_result_of_a_task_inside_a_model_is_refused_with_the_dict_form() -> None:
    from airflow.sdk import task

    with DAG("inside", schedule=None):

        @task
        def words() -> str:
            return "hi"

        found: Any = words()
        with pytest.raises(ConfigurationError) as caught:
            Task(commands=["true"], env={"NAME": found})
        assert '{"type": "task", "env": {"NAME": ...}}' in str(caught.value)
        with pytest.raises(ConfigurationError, match=r'\{"type": "task", "commands": \[\.\.\.\]\}'):
            Task(commands=["true", found])
        with pytest.raises(ConfigurationError, match=r'\{"type": "task", "image": \.\.\.\}'):
            Task(commands=["true"], image=found)
