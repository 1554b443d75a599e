"""Read the texts of a configuration as templates, but for what the shell and dstack fill in themselves.

dstack's are ``${{ secrets.name }}``, ``${{ env.NAME }}``, ``${{ run.args }}``, ``${{ groups[0]... }}`` and
``${{ dstack.job_num }}``; ``$${{ x }}`` is how a configuration writes ``${{ x }}`` itself. ``${#a}`` is a
length in a shell, where Jinja would begin a comment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from jinja2 import Environment, Template, Undefined
from jinja2.ext import Extension
from jinja2.nativetypes import NativeEnvironment

_DSTACKS = r"\$\{\{\s*(?:(?:secrets|env|run|dstack)\.|groups[.\[])[^{}]*\}\}|\$\$\{\{[^{}]*\}\}"


class ServerReferences(Extension):
    """Keeps what the shell and dstack fill in out of Airflow's templates."""

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        """Return the template with those texts protected."""
        env = self.environment
        begin, end = env.block_start_string, env.block_end_string
        # The signs keep Jinja from trimming what stands around the block.
        raw = f"{begin}+ raw {end}", f"{begin} endraw +{end}"
        found = _pattern(
            begin, end, env.variable_start_string, env.variable_end_string, env.comment_start_string
        )
        return found.sub(lambda match: match[0] if match["own"] is None else match[0].join(raw), source)


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


def for_configurations(jinja_env: Environment) -> Environment:
    """Return a copy of Airflow's environment that renders the texts of a configuration.

    With ``render_template_as_native_obj`` a template that is one expression still gives that expression's
    object. A text stays a text: read as a Python literal, as Airflow does, ``3.10`` becomes ``3.1``.
    """
    env = jinja_env.overlay(extensions=[ServerReferences])
    if isinstance(env, NativeEnvironment):
        env.template_class = Template
        env.concat = _object_or_text  # type: ignore[assignment]
    return env


def _object_or_text(parts: Iterable[Any]) -> Any:
    found = list(parts)
    if len(found) == 1 and not isinstance(found[0], str | Undefined):
        return found[0]
    return "".join(map(str, found))
