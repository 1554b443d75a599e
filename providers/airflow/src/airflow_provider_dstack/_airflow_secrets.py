"""Read the secrets that templates name: Airflow variables and fields of connections.

Rendered with Airflow's own environment, a value would need a task's context, which a triggerer has not; so
the templates know ``var`` and ``conn`` alone, and read them through the Task SDK, in any process of Airflow.
A value is returned and appears nowhere else: no error has one, nor a text that was made from one.

A run may print such a value although it is not in its environment. So a task downstream of a
``DstackSecretsOperator`` reads the same templates once more, in its own process, and masks what they give;
its trigger gets the templates, which hold no value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from airflow_provider_dstack._compat import AirflowNotFoundException, BaseHook
from airflow_provider_dstack.errors import AirflowFailException, DstackError

if TYPE_CHECKING:
    import jinja2

_ROOTS = {"conn", "var"}
# What a reference of dstack may name (its server's interpolation).
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_EXAMPLE = 'such as "{{ var.value.hf_token }}" or "{{ conn.hub.password }}"'


# Reasons of errors that name types and fields, and no value.
_PLAIN = re.compile(
    r"can only concatenate \w+ \(not \"\w+\"\) to \w+|unsupported operand type\(s\) for .+"
    r"|'[\w. ]+' object (?:is not \w+|has no attribute '\w+')|'.{1,2}' not supported between instances of .+"
    r"|access to attribute '\w+' of '[\w. ]+' object is unsafe\."
)
# A word of a template that Jinja quotes: a value may have been written there by mistake.
_QUOTED = re.compile(r"got '(?!end of |name'|string'|integer'|float')[^']*\w[^']*'")


class _WholeError(Exception):
    """A template that is a whole object, whose text is not a secret's; the message describes it."""


class _MissingError(Exception):
    """An Airflow variable or connection that does not exist; the message names it."""


class _Variables:
    """What ``var.value`` and ``var.json`` are in a template."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json

    def __getattr__(self, key: str) -> Any:
        return self.get(key)

    def get(self, key: str, default: Any = None) -> Any:
        from airflow.sdk import Variable

        found = Variable.get(key, default=None)
        if found is None and default is None:
            raise _MissingError(f"Airflow has no variable {key!r}")
        if found is None:
            return default
        # Airflow would log the text of one that is not JSON.
        return json.loads(found) if self._as_json else found


class _Connections:
    """What ``conn`` is in a template."""

    def __getattr__(self, conn_id: str) -> Any:
        return self.get(conn_id)

    def get(self, conn_id: str) -> Any:
        try:
            return BaseHook.get_connection(conn_id)
        except AirflowNotFoundException:
            raise _MissingError(f"Airflow has no connection {conn_id!r}") from None


def check_sources(secrets: object) -> dict[str, str]:
    """Return the templates by name. Raises ``ValueError``, which shows no template: it may be a value."""
    if not isinstance(secrets, Mapping) or not secrets:
        got = "an empty dict" if isinstance(secrets, Mapping) else type(secrets).__name__
        raise ValueError(f"secrets: expected a dict of names and templates, {_EXAMPLE}, got {got}.")
    for name, source in secrets.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"secrets: expected a name of 1 to 100 letters, digits and underscores, got {name!r}."
            )
        if not isinstance(source, str) or "{{" not in source:
            got = "another text" if isinstance(source, str) else type(source).__name__
            raise ValueError(
                f"secrets: expected a template that reads an Airflow variable or connection for {name}, "
                f"{_EXAMPLE}, got {got}."
            )
    return dict(secrets)


def read_sources(sources: Mapping[str, str]) -> dict[str, str]:
    """Return the values by name.

    Raises ``AirflowFailException`` for a wrong template and for a value that does not exist, and
    ``DstackError`` if Airflow could not be asked.
    """
    env = _environment()
    roots = {"var": {"value": _Variables(as_json=False), "json": _Variables(as_json=True)}}
    return {
        name: _read(env, name, source, {**roots, "conn": _Connections()}) for name, source in sources.items()
    }


def sources_upstream(task: Any) -> dict[str, str]:
    """Return the templates of the ``DstackSecretsOperator`` tasks upstream of a task."""
    if not task.has_dag():
        return {}
    setups = {one.task_id: found for one in task.dag.tasks if (found := _sources_of(one))}
    upstream = task.get_flat_relative_ids(upstream=True) if setups else set()
    # The same variable of two setups may have another value in each.
    return {
        f"{task_id}: {name}": source
        for task_id, sources in setups.items()
        if task_id in upstream
        for name, source in sources.items()
    }


def _sources_of(task: Any) -> dict[str, str]:
    """Return the templates of a ``DstackSecretsOperator``, also of a mapped one; none for another task."""
    if not getattr(getattr(task, "operator_class", task), "sets_project_secrets", False):
        return {}
    return dict(getattr(task, "secret_sources", None) or task.partial_kwargs.get("secrets") or {})


def values_to_mask(sources: Mapping[str, str], log: Any) -> list[str]:
    """Return what the templates give; one warning is logged for what cannot be read."""
    try:
        return list(read_sources(sources).values()) if sources else []
    except Exception as error:
        log.warning("Project secrets cannot be masked in the run's log: %s", error)
        return []


def _read(env: jinja2.Environment, name: str, source: str, roots: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError, meta

    try:
        names = meta.find_undeclared_variables(env.parse(source))
        if not names or names - _ROOTS:
            _fail(
                name, "a template that reads conn or var", ", ".join(sorted(names - _ROOTS)) or "another text"
            )
        value = env.from_string(source).render(roots)
    except AirflowFailException:
        raise
    except TemplateSyntaxError as error:
        reason = _QUOTED.sub("got another word", error.message or "").removesuffix(".")
        _fail(name, "a Jinja template", f"another text: {reason}")
    except _MissingError as error:
        _fail(name, "the variable or connection that its template names", f"none: {error}")
    except UndefinedError as error:
        _fail(name, "a template that names what exists", f"an undefined field or key: {error.message}")
    except _WholeError as error:
        _fail(name, "one field", f"{error}", "Name a field of it in the template.")
    except json.JSONDecodeError as error:
        _fail(name, "a variable that is JSON", f"one that is not ({error.msg})")
    except (TemplateError, TypeError, ValueError, AttributeError) as error:
        reason = f": {error}".removesuffix(".") if _PLAIN.fullmatch(str(error)) else ""
        _fail(name, "a template that can be rendered", f"{type(error).__name__}{reason}")
    except Exception as error:
        raise DstackError(
            f"secrets: expected Airflow's answer for {name}, got {type(error).__name__}. "
            "Run the task again when Airflow or its secrets backend answers."
        ) from None
    if not value:
        _fail(name, "a text", "an empty one")
    return value


def _fail(
    name: str, expected: str, got: str, way: str = "Correct the template, or add what it reads."
) -> NoReturn:
    raise AirflowFailException(f"secrets: expected {expected} for {name}, got {got}. {way}") from None


def _environment() -> jinja2.Environment:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    # No page is made of these values.
    return SandboxedEnvironment(undefined=StrictUndefined, finalize=_one_text)


def _one_text(value: Any) -> Any:
    """Return what a template shows of a value. Raises ``_WholeError`` for one that is more than a text."""
    from jinja2 import Undefined

    # Else a password that was never set would be the text "None".
    if value is None:
        return ""
    if isinstance(value, str | int | float | Undefined):
        return value
    if hasattr(value, "conn_id"):
        raise _WholeError(
            f"the whole connection {value.conn_id!r}, such as {{{{ conn.hub }}}} for "
            "{{ conn.hub.password }}"
        )
    raise _WholeError(
        f"a whole {type(value).__name__}, such as {{{{ var.json.team }}}} for {{{{ var.json.team.token }}}}"
    )
