"""The names of project secrets that tasks set for the time of a DAG run.

A project secret has a name and a value, which the server does not return: no marker fits elsewhere. So the
name holds the owner, ``airflow_<dag>Z_<run>Z_<born><task>_<variable>``, and every try of a task has the same
names. ``born`` is that of ``_names``, ``task`` six hex digits of the task's id and map index. In ids, ``Z``
begins what a reference of dstack may not contain: ``Zm`` is a minus, ``Zc`` a colon, ``ZuHH`` a byte.

A name has 200 characters at most (the server's limit). Shortened ids could not be looked up in Airflow, so
longer ones are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from airflow_provider_dstack._resource_names import ResourceOwner
from airflow_provider_dstack.errors import AirflowFailException

if TYPE_CHECKING:
    from airflow_provider_dstack._compat import Context

_LONGEST = 200
_CODES = {"Z": "z", "-": "m", ".": "p", ":": "c", "+": "x", "~": "t"}
_CHARACTERS = {code: character for character, code in _CODES.items()}
_PLAIN = re.compile(r"[A-Ya-z0-9_]")
_ESCAPED = re.compile(r"((?:Zu[0-9a-f]{2})+)|Z([a-z])")
_SECRET = re.compile(
    r"airflow_(?P<dag>\w+?)Z_(?P<run>\w+?)Z_(?P<born>[0-9a-f]{6})(?P<task>[0-9a-f]{6})_(?P<variable>\w+)",
    re.ASCII,
)


def owner_prefix(context: Context, task_id: str | None = None) -> str:
    """Return what the names of the secrets begin with that a task instance of the DAG run sets."""
    from dstack_core.integration import short_hash

    owner = ResourceOwner.of(context, "secret", task_id)
    task = short_hash(str(owner), 6)
    return f"airflow_{_escaped(owner.dag_id)}Z_{_escaped(owner.run_id)}Z_{owner.born}{task}_"


def secret_names_of(context: Context, variables: Iterable[str]) -> dict[str, str]:
    """Return the names of the secrets for variables. Raises ``AirflowFailException`` for one too long."""
    prefix = owner_prefix(context)
    for variable in variables:
        if len(prefix) + len(variable) > _LONGEST:
            ti = context["ti"]
            raise AirflowFailException(
                f"secrets: expected a name of at most {_LONGEST} characters for {variable}, got "
                f"{len(prefix) + len(variable)}: it holds the ids of the DAG ({len(ti.dag_id)} characters) "
                f"and of the DAG run ({len(ti.run_id)}). Shorten one of them, or set it with keep=True."
            )
    return {variable: f"{prefix}{variable}" for variable in variables}


def owner_of_secret(name: str) -> ResourceOwner | None:
    """Return the owner that a name holds, without its task; None for any other name."""
    found = _SECRET.fullmatch(name)
    if found is None:
        return None
    return ResourceOwner("secret", _plain(found["dag"]), _plain(found["run"]), "", None, found["born"])


def _escaped(text: str) -> str:
    return "".join(one if _PLAIN.fullmatch(one) else _escape(one) for one in text)


def _escape(character: str) -> str:
    if character in _CODES:
        return f"Z{_CODES[character]}"
    return "".join(f"Zu{byte:02x}" for byte in character.encode())


def _plain(text: str) -> str:
    def plain(found: re.Match[str]) -> str:
        if found[1]:
            return bytes.fromhex(found[1].replace("Zu", "")).decode(errors="replace")
        return _CHARACTERS.get(found[2], "?")

    return _ESCAPED.sub(plain, text)
