"""Render templates inside the models of ``dstack_core``, and hide what is secret in them.

The problem: Airflow renders texts, lists and dicts. A configuration may be a model of ``dstack_core``, or it
may be YAML with what looks like a template and is not one: the shell fills in ``${#a}``, where Jinja would
begin a comment, and dstack fills in ``${{ secrets.name }}``, ``${{ env.NAME }}``, ``${{ run.args }}``,
``${{ groups[0]... }}`` and ``${{ dstack.job_num }}``; a configuration writes ``${{ x }}`` itself as
``$${{ x }}``. And Airflow shows each field that was rendered, secrets included.

The idea: fields are rendered one after the other by an environment of Airflow's with two changes. A text that
is not for Jinja is put into a raw block before Jinja reads it. With ``render_template_as_native_obj`` a
template that is one expression still gives that expression's object, but a text stays a text.

Invariants: a template that cannot be parsed is reported with its field, before Airflow renders anything. What
is secret is masked before Airflow shows or logs the field, and once more after it was rendered.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._compat import AirflowFailException, BaseOperator, Context, mask_secret

if TYPE_CHECKING:
    import jinja2
    from jinja2.ext import Extension

    from dstack_core.integration import MaskEnv

# Fields that hold text: with native rendering, a number or a flag that a template gives becomes one.
_TEXTS = frozenset({"args", "commands", "env", "registry_auth", "requirements", "tags"})
_TEXT = frozenset(
    {
        "image",
        "python",
        "cache_dir",
        "entrypoint",
        "name",
        "user",
        "shell",
        "working_dir",
        "run_name",
        "repo_dir",
        "profile",
        "profiles_file",
        "git_conn_id",
        "dstack_conn_id",
        "project_name",
    }
)
# What a function is called with is Airflow's to render, literals included.
_HOSTS_OWN = frozenset({"op_args", "op_kwargs"})
_SECRETS = frozenset({"env", "registry_auth"})
_RAW = "Put what Airflow must not render between {% raw %} and {% endraw %}."
_DSTACKS = r"\$\{\{\s*(?:(?:secrets|env|run|dstack)\.|groups[.\[])[^{}]*\}\}|\$\$\{\{[^{}]*\}\}"
_DATES = frozenset({"ds", "ds_nodash", "ts", "ts_nodash", "ts_nodash_with_tz", "logical_date"})


class TemplatedModels(BaseOperator):
    """An operator whose ``configuration`` is a model, a dict, YAML text or a file, with templates."""

    configuration: Any
    # Of the file that the configuration was read from; None for any other form.
    configuration_folder: Path | None = None
    # Which values of the environment are masked.
    mask_env: MaskEnv = "secrets"
    # The field that is being rendered.
    _field: str = ""
    # The templates of the project secrets upstream, and what they gave.
    synced_sources: dict[str, str] | None = None
    _synced_values: list[str] | None = None
    # The variables whose templates read a secret of Airflow's.
    _from_secrets: frozenset[str] = frozenset()

    def secret_texts(self) -> Iterator[str]:
        """Yield the texts that logs and rendered fields must not show."""
        from airflow_provider_dstack._parameters import secrets_in

        env = getattr(self, "env", None)
        yield from secrets_in(self.configuration, env, self.mask_env, self.secret_names())
        yield from self._project_secrets()

    def secret_names(self) -> list[str]:
        """Return the variables that are masked whatever their names look like."""
        from airflow_provider_dstack._secret_sources import secret_names

        return secret_names(self.configuration, getattr(self, "env", None), self._from_secrets)

    def _project_secrets(self) -> list[str]:
        from airflow_provider_dstack._airflow_secrets import sources_upstream, values_to_mask

        if self._synced_values is None:
            self.synced_sources = sources_upstream(self)
            self._synced_values = values_to_mask(self.synced_sources, self.log)
        return self._synced_values

    def resolve_template_files(self) -> None:
        """Read the configuration's file, as Airflow does when it parses the DAG; no other field names one."""
        from jinja2 import TemplateNotFound

        if self._is_file(self.configuration):
            # A file that is missing is reported by the task.
            with suppress(TemplateNotFound):
                self.configuration = self._read(self.configuration, self.get_template_env())
        self.prepare_template()

    def _read(self, path: str, env: jinja2.Environment) -> str:
        """Return the text of the configuration's file. Raises ``TemplateNotFound``."""
        from jinja2 import TemplateNotFound

        if env.loader is None:
            raise TemplateNotFound(path)
        source, found, _ = env.loader.get_source(env, path)
        self.configuration_folder = None if found is None else Path(found).parent
        return source

    def _do_render_template_fields(
        self,
        parent: Any,
        template_fields: Iterable[str],
        context: Context,
        jinja_env: jinja2.Environment,
        seen_oids: set[int],
    ) -> None:
        """Render the templates, and have secrets hidden before the fields are shown anywhere.

        Airflow renders a mapped task by this method, past ``render_template_fields``.
        """
        from jinja2 import UndefinedError

        from airflow_provider_dstack._setup_results import refuse_missing_results
        from airflow_provider_dstack.links import leave_pushed
        from dstack_core import ConfigurationError

        leave_pushed(self)
        # A template that fails is logged with all of its field.
        self._hide(text for text in self.secret_texts() if "{{" not in text)
        self._from_secrets = frozenset()
        hosts_own, own = jinja_env.overlay(extensions=[_server_references()]), _for_configurations(jinja_env)
        try:
            for field in template_fields:
                self._field = field
                # Before Airflow renders: it logs what is raised then, and one problem is reported once.
                self._check(getattr(parent, field, None), field, own)
                refuse_missing_results(self, field, getattr(parent, field, None), context)
                env = hosts_own if field in _HOSTS_OWN else own
                super()._do_render_template_fields(parent, (field,), context, env, seen_oids)
        except ConfigurationError as error:
            raise AirflowFailException(error.message) from None
        except UndefinedError as error:
            missing = str(error.message).split("'")[1:2]
            if not _DATES.intersection(missing):
                raise
            raise AirflowFailException(
                f"{self._field}: expected a DAG run with a logical date for {missing[0]!r}, got one that was "
                "triggered without. Use {{ dag_run.run_after | ds }} or {{ run_id }}."
            ) from None
        finally:
            self._field = ""
        self._hide(self.secret_texts())

    @staticmethod
    def _hide(secrets: Iterable[str]) -> None:
        for secret in secrets:
            mask_secret(secret)

    def render_template(
        self,
        content: Any,
        context: Context,
        jinja_env: jinja2.Environment | None = None,
        seen_oids: set[int] | None = None,
    ) -> Any:
        """Render templates, also inside the models of ``dstack_core``."""
        if self._field in _HOSTS_OWN:
            # Only the configuration as a whole may name a file; a command may well end with ".yml".
            endings, self.template_ext = self.template_ext, ()
            try:
                return super().render_template(content, context, jinja_env, seen_oids)
            finally:
                self.template_ext = endings
        env = jinja_env or _for_configurations(self.get_template_env())
        return self._render_in(content, context, env, seen_oids, self._field)

    def _render_in(
        self,
        value: Any,
        context: Context,
        env: jinja2.Environment,
        seen: set[int] | None,
        field: str,
        inside: bool = False,
    ) -> Any:
        """Render a value of a field; ``inside`` a field of texts, everything becomes text."""
        from airflow_provider_dstack._parameters import is_model, render_model

        if isinstance(value, str):
            is_file = field == "configuration" and value is self.configuration and self._is_file(value)
            template = env.from_string(self._read(value, env) if is_file else value)
            return _as_text(template.render(context), field, inside)
        if is_model(value):
            return render_model(value, lambda name, one: self._render_in(one, context, env, seen, name))
        within = inside or field in _TEXTS
        if type(value) in (list, tuple):
            return type(value)(self._render_in(one, context, env, seen, field, within) for one in value)
        if type(value) is dict:
            return {
                key: self._render_in(one, context, env, seen, field if within else str(key), within)
                for key, one in value.items()
            }
        return super().render_template(value, context, env, seen)

    def _check(self, value: Any, where: str, env: jinja2.Environment) -> None:
        """Raise ``AirflowFailException`` for a template that cannot be parsed, and for a missing file."""
        from jinja2 import TemplateNotFound, TemplateSyntaxError

        from airflow_provider_dstack._parameters import is_model
        from airflow_provider_dstack._secret_sources import secret_names_in

        if isinstance(value, str):
            try:
                if where == "configuration" and self._is_file(value):
                    value = self._read(value, env)
                found_names = secret_names_in(where, value, env.parse(value), env.parse)
                self._from_secrets = self._from_secrets.union(found_names)
            except TemplateNotFound as error:
                raise AirflowFailException(
                    f"configuration: expected a file {error.name!r} in the DAG's folder or in its "
                    "template_searchpath, got none. Correct the path, or pass a pathlib.Path for a file "
                    "elsewhere."
                ) from None
            except TemplateSyntaxError as error:
                found = "another string" if _SECRETS.intersection(where.split(".")) else f"{error.message}"
                raise AirflowFailException(
                    f"{where}, line {error.lineno}: expected a Jinja template, got {found}. {_RAW}"
                ) from None
        elif is_model(value):
            for name in value.model_fields_set:
                self._check(getattr(value, name), f"{where}.{name}", env)
        elif isinstance(value, Mapping):
            for key, one in value.items():
                self._check(one, f"{where}.{key}", env)
        elif isinstance(value, list | tuple):
            for number, one in enumerate(value):
                self._check(one, f"{where}[{number}]", env)

    def _is_file(self, value: Any) -> bool:
        return isinstance(value, str) and "\n" not in value and value.endswith(tuple(self.template_ext))


def _as_text(found: Any, field: str, inside: bool) -> Any:
    """Return what native rendering gave as the text that the field wants, if it wants one."""
    if inside:
        return str(found)
    wants_text = found is not None if field in _TEXT else not isinstance(found, Mapping | list | tuple)
    return str(found) if field in _TEXT | _TEXTS and wants_text else found


@cache
def _server_references() -> type[Extension]:
    """Return the extension that keeps what the shell and dstack fill in out of templates."""
    # Its base class costs a millisecond to import, which a DAG file is not to pay.
    from jinja2.ext import Extension

    class ServerReferences(Extension):
        """A preprocessor that puts those texts into raw blocks."""

        def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
            env = self.environment
            begin, end = env.block_start_string, env.block_end_string
            # The signs keep Jinja from trimming what stands around the block.
            raw = f"{begin}+ raw {end}", f"{begin} endraw +{end}"
            found = _pattern(
                begin, end, env.variable_start_string, env.variable_end_string, env.comment_start_string
            )
            return found.sub(lambda match: match[0] if match["own"] is None else match[0].join(raw), source)

    return ServerReferences


@lru_cache(maxsize=8)
def _pattern(begin: str, end: str, variable: str, variable_end: str, comment: str) -> re.Pattern[str]:
    """Return what finds a text to protect (group ``own``), and skips whole raw blocks and values."""
    block, close, value, value_end, note = map(re.escape, (begin, end, variable, variable_end, comment))
    length = rf"\${note}|" if comment == "{#" else ""
    return re.compile(
        rf"{block}[-+]?\s*raw\s*-?{close}.*?{block}[-+]?\s*endraw\s*[-+]?{close}"
        rf"|(?P<own>{length}{_DSTACKS})"
        rf"|{value}.*?{value_end}|{block}.*?{close}",
        re.DOTALL,
    )


def _for_configurations(jinja_env: jinja2.Environment) -> jinja2.Environment:
    """Return a copy of Airflow's environment that renders the texts of a configuration.

    With ``render_template_as_native_obj`` a template that is one expression still gives that expression's
    object. A text stays a text: read as a Python literal, as Airflow does, ``3.10`` becomes ``3.1``.
    """
    from jinja2 import Template
    from jinja2.nativetypes import NativeEnvironment

    env = jinja_env.overlay(extensions=[_server_references()])
    if isinstance(env, NativeEnvironment):
        env.template_class = Template
        env.concat = _object_or_text  # type: ignore[assignment]
    return env


def _object_or_text(parts: Iterable[Any]) -> Any:
    from jinja2 import Undefined

    found = list(parts)
    if len(found) == 1 and not isinstance(found[0], str | Undefined):
        return found[0]
    return "".join(map(str, found))
