"""Leave to the dstack server what it fills in itself: ``${{ secrets.name }}`` and ``${{ env.NAME }}``."""

from __future__ import annotations

import re

from jinja2.ext import Extension

# What a user has put into {% raw %} already is left as it is.
_REFERENCE = re.compile(r"(?<!\{% raw %\})\$\{\{\s*(?:secrets|env)\.[^{}]*\}\}")


class ServerReferences(Extension):
    """Keep references to dstack's secrets out of Airflow's templates, which have none of these names."""

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        """Return the template with its references protected."""
        return _REFERENCE.sub(r"{% raw %}\g<0>{% endraw %}", source)
