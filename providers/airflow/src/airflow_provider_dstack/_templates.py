"""Render templates inside the models of ``dstack_core``, and hide what is secret in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._compat import AirflowFailException, BaseOperator, Context, mask_secret

if TYPE_CHECKING:
    import jinja2


class TemplatedModels(BaseOperator):
    """Be an operator whose ``configuration`` is a model, a dict, YAML text or a file, with templates."""

    configuration: Any

    def secret_texts(self) -> Iterator[str]:
        """Yield what is to be hidden in logs and rendered fields."""
        from airflow_provider_dstack._spec import secrets_in

        yield from secrets_in(self.configuration)

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
        from jinja2 import TemplateNotFound

        from airflow_provider_dstack._references import ServerReferences
        from dstack_core import ConfigurationError

        # A template that fails is logged with all of its field.
        self._hide(text for text in self.secret_texts() if "{{" not in text)
        with_references = jinja_env.overlay(extensions=[ServerReferences])
        try:
            super()._do_render_template_fields(parent, template_fields, context, with_references, seen_oids)
        except TemplateNotFound as error:
            raise AirflowFailException(
                f"configuration: there is no file {error.name!r} in the DAG's folder or in its "
                "template_searchpath; correct the path, or pass a pathlib.Path for a file elsewhere"
            ) from None
        except ConfigurationError as error:
            raise AirflowFailException(error.message) from None
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
        """Render templates also inside the models of ``dstack_core``."""
        from airflow_provider_dstack._spec import is_model, render_model

        if is_model(content):
            return render_model(
                content, lambda value: self.render_template(value, context, jinja_env, seen_oids)
            )
        if isinstance(content, str) and content is not self.configuration:
            # Only the configuration as a whole may name a file; a command may well end with ".yml".
            endings, self.template_ext = self.template_ext, ()
            try:
                return super().render_template(content, context, jinja_env, seen_oids)
            finally:
                self.template_ext = endings
        return super().render_template(content, context, jinja_env, seen_oids)
