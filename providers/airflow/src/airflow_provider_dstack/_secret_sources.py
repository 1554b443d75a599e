"""Which variables of a run's environment come from where Airflow keeps secrets.

The problem: ``env={"WORD": "{{ conn.db.password }}"}`` has a secret in a variable whose name does not look
like one. Airflow hides it in the log of the worker, which fetched it; the triggerer, which relays the log of
a deferred task, knows only the run's environment.

The idea: a template is parsed before it is rendered. If it reads a connection's password or extra, or an
Airflow variable whose name looks secret, the variable of the environment that it is written into is a
secret. Only names are remembered, which the trigger can carry.

When in doubt (a name that the template computes), it is a secret. Source: Airflow documentation, "Masking
sensitive data".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from airflow_provider_dstack._compat import conf
from airflow_provider_dstack._parameters import readable_or_none

if TYPE_CHECKING:
    from jinja2 import nodes

# Airflow hides a variable, and a field of an extra, whose name contains one of these. A test compares them
# with the installed Airflow's.
AIRFLOWS_WORDS = (
    "access_key",
    "access_token",
    "api_key",
    "apikey",
    "auth_header",
    "authorization",
    "bearer",
    "connection_string",
    "dsn",
    "keyfile_dict",
    "passphrase",
    "passwd",
    "password",
    "private_key",
    "proxies",
    "proxy",
    "proxy_password",
    "secret",
    "service_account",
    "service_key",
    "token",
    "webhook_url",
)
EVERY = "*"
"""Stands for all variables: those of an environment that one template makes."""
# The parts of a connection that Airflow shows in its UI, too.
_SHOWN_PARTS = frozenset({"conn_id", "conn_type", "description", "host", "login", "port", "schema"})
# ``- NAME={{ ... }}`` and ``NAME: {{ ... }}`` in YAML.
_NAME_IN_YAML = re.compile(r"""^\s*(?:-\s+)?["']?([A-Za-z_]\w*)["']?\s*[:=]""")


def secret_names_in(where: str, text: str, tree: nodes.Node, parse: Any) -> Iterator[str]:
    """Yield the variables of the environment that get a secret from Airflow by a template.

    Args:
        where: The field, such as ``"env.WORD"``, ``"configuration.env[0]"`` or ``"configuration"`` (YAML).
        text: The template.
        tree: The parsed template.
        parse: Parses a template; for the lines of YAML.
    """
    if not reads_secret(tree):
        return
    path = where.removeprefix("configuration.")
    if path == "configuration":
        yield from _names_in_yaml(text, parse)
    elif path == "env":
        yield EVERY
    elif path.startswith("env."):
        yield path.removeprefix("env.")
    elif path.startswith("env["):
        yield text.partition("=")[0].strip()


def secret_names(configuration: Any, env: Any, from_secrets: Collection[str]) -> list[str]:
    """Return the variables that Airflow keeps the values of as secrets.

    Beside ``from_secrets`` these are the names that its setting ``[core] sensitive_var_conn_names`` hides.
    """
    from dstack_core.integration import env_names

    words, names = _words_of_site(), set(from_secrets)
    if words or EVERY in names:
        of_env = env_names(readable_or_none(configuration), env)
        found = {name for name in of_env if any(word in name.lower() for word in words)}
        names = of_env if EVERY in names else names | found
    return sorted(names)


def reads_secret(node: nodes.Node) -> bool:
    """Return whether a template reads a secret of a connection, or an Airflow variable that is one."""
    chain = _chain(node)
    if chain is not None and chain[0] in ("conn", "var"):
        return _is_secret(chain)
    return any(reads_secret(child) for child in node.iter_child_nodes())


def _is_secret(chain: list[str | None]) -> bool:
    root, *parts = chain
    if root == "conn":
        # The first part is the connection's id; a whole connection may be read later.
        part = parts[1] if len(parts) > 1 else None
        if part == "extra_dejson" and len(parts) > 2:
            return any(key is None or _looks_secret(key) for key in parts[2:])
        return part not in _SHOWN_PARTS
    return len(parts) < 2 or any(part is None or _looks_secret(part) for part in parts[1:])


def _looks_secret(name: str) -> bool:
    from dstack_core.integration import is_secret_name

    lower = name.strip().lower()
    return is_secret_name(name) or any(word in lower for word in (*AIRFLOWS_WORDS, *_words_of_site()))


def _words_of_site() -> tuple[str, ...]:
    found = conf.get("core", "sensitive_var_conn_names", fallback="") or ""
    return tuple(filter(None, (word.strip().lower() for word in found.split(","))))


def _chain(node: nodes.Node) -> list[str | None] | None:
    """Return ``["var", "value", "x"]`` for ``var.value.x`` and its other spellings; None for other nodes."""
    from jinja2 import nodes

    parts: list[str | None] = []
    while not isinstance(node, nodes.Name):
        if isinstance(node, nodes.Getattr):
            parts.append(node.attr)
            node = node.node
        elif isinstance(node, nodes.Getitem):
            parts.append(_constant(node.arg))
            node = node.node
        elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
            if node.node.attr == "get" and node.args:
                parts.append(_constant(node.args[0]))
                node = node.node.node
            else:
                node = node.node
        else:
            return None
    return [node.name, *reversed(parts)]


def _constant(node: nodes.Node) -> str | None:
    from jinja2 import nodes

    return str(node.value) if isinstance(node, nodes.Const) else None


def _names_in_yaml(text: str, parse: Any) -> Iterator[str]:
    from jinja2 import TemplateSyntaxError

    name: str | None = None
    for line in text.splitlines():
        found = _NAME_IN_YAML.match(line)
        name = found[1] if found else name
        try:
            # A template over several lines cannot be parsed line by line; it is in doubt.
            is_secret = reads_secret(parse(line))
        except TemplateSyntaxError:
            is_secret = True
        if is_secret:
            yield EVERY if name in (None, "env") else name
