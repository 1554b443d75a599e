"""Render templates inside the models of ``dstack_core``, and hide what is secret in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._compat import AirflowFailException, BaseOperator, Context, mask_secret

if TYPE_CHECKING:
    import jinja2


class TemplatedModels(BaseOperator):
    """Be an operator whose ``configuration`` is a model, a dict, YAML text or a file, with templates."""

    configuration: Any

    def render_template_fields(self, context: Context, jinja_env: jinja2.Environment | None = None) -> None:
        """Render the templates, and have secrets hidden before the rendered fields are shown anywhere."""
        from jinja2 import TemplateNotFound

        from airflow_provider_dstack._spec import secrets_in
        from dstack_core import ConfigurationError

        try:
            super().render_template_fields(context, jinja_env)
        except TemplateNotFound as error:
            raise AirflowFailException(
                f"configuration: there is no file {error.name!r} in the DAG's folder or in its "
                "template_searchpath; correct the path, or pass a pathlib.Path for a file elsewhere"
            ) from None
        except ConfigurationError as error:
            raise AirflowFailException(error.message) from None
        for secret in secrets_in(self.configuration):
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
