"""Read what a run clones a private repository with from a connection of Airflow's own type ``git``.

The fields are those of ``apache-airflow-providers-git``, which need not be installed: the access token is the
password, or stands in the repository's URL (the host); the extra has ``private_key`` or ``key_file``, and
``private_key_passphrase``. Source: that provider's documentation, "GIT Connection".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from airflow_provider_dstack._compat import (
    AirflowFailException,
    AirflowNotFoundException,
    BaseHook,
    mask_secret,
)

if TYPE_CHECKING:
    from airflow.sdk import Connection

_USER_AND_TOKEN = re.compile(r"https?://[^/@:]*:(?P<token>[^/@]+)@", re.IGNORECASE)
# Lines of a key that are shorter than this are its frame, or its last one. Masking such short texts would
# hide ordinary words of the log.
_KEY_LINE = 20


def git_credentials(git_conn_id: str | None) -> dict[str, Any]:
    """Return the credentials as ``Client.from_config`` takes them; empty without any.

    The token counts for a URL over https, the key otherwise. Raises ``AirflowFailException``.
    """
    if not git_conn_id:
        return {}
    connection = _connection(git_conn_id)
    extra = connection.extra_dejson
    url = connection.host or ""
    in_url = _USER_AND_TOKEN.match(url)
    token = connection.password or (unquote(in_url["token"]) if in_url else None)
    key = None if token and url.lower().startswith("http") else _private_key(git_conn_id, extra)
    if key:
        for text in (key, *(line for line in key.splitlines() if len(line) > _KEY_LINE)):
            mask_secret(text)
        return {"git_private_key": key}
    if token:
        mask_secret(token)
        return {"oauth_token": token}
    if extra.get("github_app_id"):
        raise _wrong(
            git_conn_id,
            "an access token or a private key",
            "a GitHub App, whose tokens end within an hour",
            "Use a connection with a token, or with a deploy key.",
        )
    return {}


def _connection(git_conn_id: str) -> Connection:
    try:
        connection = BaseHook.get_connection(git_conn_id)
    except AirflowNotFoundException:
        raise AirflowFailException(
            f"git_conn_id: expected a connection of type git, and there is none called {git_conn_id!r}. "
            "Add it with an access token as its password, or with private_key or key_file in its extra."
        ) from None
    if connection.conn_type != "git":
        # The token of another service is not for the Git server.
        raise _wrong(
            git_conn_id,
            "a connection of type git",
            f"one of type {connection.conn_type}",
            "Name the connection that has the access token or the key of the repository.",
        )
    return connection


def _private_key(git_conn_id: str, extra: dict[str, Any]) -> str | None:
    text, file = extra.get("private_key"), extra.get("key_file")
    if text and file:
        raise _wrong(git_conn_id, "private_key or key_file in the extra", "both", "Drop one of the two.")
    if file:
        try:
            text = Path(file).expanduser().read_text()
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a text file"
            raise _wrong(
                git_conn_id,
                f"a private key in key_file {file!r}",
                f"none ({reason})",
                "Put the file on every worker, or use private_key.",
            ) from None
    if text and "PRIVATE KEY-----" not in text:
        raise _wrong(
            git_conn_id,
            'the contents of a private key file ("-----BEGIN ... PRIVATE KEY-----")',
            "a string that is not a key",
            "The path of a key is for key_file.",
        )
    passphrase = extra.get("private_key_passphrase")
    return _without_passphrase(git_conn_id, str(text), str(passphrase)) if text and passphrase else text


def _without_passphrase(git_conn_id: str, text: str, passphrase: str) -> str:
    """Return the key in clear text, since a run cannot be asked for the passphrase."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization as keys

    mask_secret(passphrase)
    text = "\n".join(text.strip().splitlines()) + "\n"
    load = keys.load_ssh_private_key if "OPENSSH" in text else keys.load_pem_private_key
    try:
        key = load(text.encode(), passphrase.encode())
    except TypeError:
        return text  # The key has no passphrase.
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _wrong(
            git_conn_id,
            "a private key that private_key_passphrase opens",
            f"none ({error})",
            "Correct the passphrase, or use a key without one.",
        ) from None
    return key.private_bytes(keys.Encoding.PEM, keys.PrivateFormat.OpenSSH, keys.NoEncryption()).decode()


def _wrong(git_conn_id: str, expected: str, got: str, advice: str) -> AirflowFailException:
    return AirflowFailException(f"git_conn_id {git_conn_id!r}: expected {expected}, got {got}. {advice}")
