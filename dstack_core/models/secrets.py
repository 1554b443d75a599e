"""What in the environment of a run is a secret.

The problem: a program cannot see which variable is a secret. If every value counts as one, ``STAGE=train``
turns ``training`` into ``***ing``; if none does, a token shows in a log.

The idea: names follow habits. A name is split into words (``_``, ``-``, ``.`` and camelCase separate them),
and a word such as ``token`` makes it a secret, unless a word beside it shows that the value is a number, a
file or a mode (``MAX_TOKENS``, ``KEY_FILE``, ``AUTH_TYPE``). Whole words count, so that ``TOKENIZER`` and
``KEYBOARD`` stay readable. Beside the name, a value that is or contains a login is a secret: the password of
a URL, ``password=...`` in a connection string, a private key.

Invariants: when in doubt, the name is a secret. A value that is too common to be one (a number, a flag, a
mode such as ``basic``) is never masked, whatever its name. A reference such as ``${{ secrets.name }}`` is
not its value.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Literal, TypeAlias
from urllib.parse import unquote

MaskEnv: TypeAlias = Literal["secrets", "all", "none"] | Collection[str]
"""Which values of a run's environment are masked: those that look like secrets, all, none, or those that
look like secrets and those of the listed names."""


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Characters. Shorter texts are shorter than any credential, and common enough to make other lines unreadable.
_SHORTEST = 5
# Digits. A number of fewer digits is a setting (a count, a port, a date), and occurs in many log lines.
_SHORTEST_NUMBER = 8
# Characters. A user name in a URL of this length, without a password, is an access token.
_SHORTEST_URL_TOKEN = 16
_FLAGS = frozenset({"true", "false"})
# Values of variables such as AUTH that name a way to log in, and values that protect nothing.
_COMMON = _set(
    "enabled disabled required optional default basic bearer oauth oauth2 token tokens password "
    "secret always never local"
)
_SECRET_WORDS = _set(
    "token password passwords passwd passphrase passphrases passcode secret secrets credential credentials "
    "creds key auth authorization bearer jwt dsn webhook keyfile"
)
# Secret only as the last word: PASS_RATE and PRIVATE_REPO are not.
_LAST_WORDS = frozenset({"pass", "pat", "pw", "pwd", "private", "sas"})
_PAIRS = frozenset(
    {("connection", "string"), ("connection", "str"), ("conn", "string"), ("conn", "str")}
    | {(head, many) for head in ("api", "access", "auth", "secret", "private", "ssh") for many in ("keys",)}
    | {(head, many) for head in ("api", "access", "auth", "refresh", "bearer") for many in ("tokens",)}
)
# A name that ends so describes a secret, or names the place of one.
_ABOUT = _set(
    "file files path paths dir directory folder name names user username type types mode kind format "
    "algorithm algo method scheme provider issuer backend size length len count limit budget "
    "number ttl timeout expiry expires expiration seconds minutes hours days interval age rotation rate "
    "ratio enabled disabled required url uri endpoint host hostname port domain server version region scope "
    "scopes column columns field fields prefix suffix arn metric metrics mixer pooling dropout embedding "
    "embeddings merging level position strategy vault"
)
# A number of things, or a switch.
_COUNTS = frozenset({"max", "min", "num", "n", "total", "avg", "mean", "per"})
# What comes before a word that then means something else: the special tokens of a language model, the keys
# of tables and maps, and the half of a key pair that is not secret.
_OTHER_MEANINGS = {
    "token": _set(
        "eos bos pad unk sep cls mask stop start end eot im image special system next first last separator"
    ),
    "key": _set(
        "public pub primary foreign partition sort join index cache routing group hash lookup order unique "
        "row dict column input output target label"
    ),
}
# Names without separators, such as PGPASSWORD and HFTOKEN. Many words end with "key", so there the word
# before it must be known: MONKEY is not one.
_GLUED = re.compile(
    r"(.+)(tokens?|passwords?|passwd|passphrase|secrets?|credentials?|string)"
    r"|(api|access|secret|private|public|auth|ssh|encryption|signing|account|master)(keys?)"
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_SEPARATORS = re.compile(r"[^A-Za-z]+")
_REFERENCE = re.compile(r"\$\{\{[^{}]*\}\}")
_URL_LOGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^\s/:@?#]*)(?::([^\s/]*))?@([^\s/:?#]*)")
_SETTING = re.compile(r"([A-Za-z][\w.-]*)=(?:\"([^\"]+)\"|'([^']+)'|([^\s;&,'\"]+))")
_PRIVATE_KEY = "PRIVATE KEY-----"


def secret_values(env: Mapping[str, str | None], *, mask_env: MaskEnv = "secrets") -> Iterator[str]:
    """Yield those values of an environment, such as ``run.env``, that a log must not show.

    By default these are the values of variables whose name looks like that of a secret (``HF_TOKEN``,
    ``dbPassword``), and what is a login in other values: the password of a URL, ``password=...`` in a
    connection string, a private key. Texts of less than 5 characters, numbers of less than 8 digits, flags
    and words such as ``basic`` are never secrets, nor are references such as ``${{ secrets.name }}``. A
    server returns the values of a run in clear text. Source: PROTOCOL 1.5.

    Args:
        env: The variables by name; one without a value is left out.
        mask_env: ``"secrets"`` for this rule, ``"all"`` for every value except numbers, ``"none"`` for no
            value, or names of further variables beside this rule. Default ``"secrets"``.

    Yields:
        Each secret once.

    Example:
        ``masked = list(secret_values(run.env))``
    """
    names = {name.casefold() for name in mask_env} if not isinstance(mask_env, str) else set()
    seen: set[str] = set()
    for name, value in env.items():
        if not value or mask_env == "none":
            continue
        if mask_env == "all":
            found = [value, *_logins(value)] if not _is_number(value) else []
        elif name.casefold() in names or is_secret_name(name) or _PRIVATE_KEY in value:
            found = [value, *_logins(value)]
        else:
            found = list(_logins(value))
        for secret in secret_texts(found):
            is_common = secret.lower() in _COMMON or _REFERENCE.fullmatch(secret.strip())
            if secret not in seen and not is_common:
                seen.add(secret)
                yield secret


@lru_cache(maxsize=1024)
def is_secret_name(name: str) -> bool:
    """Return whether the name of a variable looks like that of a secret, in any case and spelling."""
    words = list(_words(name))
    if not words or "webhook" in words:
        return bool(words)
    if words[-1] in _ABOUT or [words[-1]] == words == ["pwd"]:
        return False
    if words[-1] in _LAST_WORDS:
        return True
    pairs = list(zip(["", *words], words, strict=False))
    return any(
        pair in _PAIRS
        or (
            pair[1] in _SECRET_WORDS
            and pair[0] not in _COUNTS
            and pair[0] not in _OTHER_MEANINGS.get(pair[1], ())
        )
        for pair in pairs
    )


def secret_texts(values: Iterable[str | None]) -> Iterator[str]:
    """Yield those of ``values``, all of them secrets, that can be masked.

    A short text, a flag or a short number occurs everywhere: masking it makes other text unreadable.
    """
    for value in values:
        if value and len(value) >= _SHORTEST and value.lower() not in _FLAGS:
            is_long = value.isdecimal() and len(value) >= _SHORTEST_NUMBER
            if is_long or not _is_number(value):
                yield value


def _words(name: str) -> Iterator[str]:
    for part in _SEPARATORS.split(name):
        for word in _CAMEL.split(part):
            found = _GLUED.fullmatch(word.lower())
            yield from filter(None, found.groups() if found else (word.lower(),))


def _logins(value: str) -> Iterator[str]:
    """Yield what is secret in a value, whatever the name of its variable."""
    for found in _URL_LOGIN.finditer(value):
        scheme, user, password, host = found.groups()
        if password is None:
            if scheme.lower() in ("http", "https") and len(user) >= _SHORTEST_URL_TOKEN:
                yield user
        elif password:
            # With its surroundings: a password that is short, or also the name of the user or host, would
            # hide these words everywhere.
            yield f"//{user}:{password}@"
            # Several hosts may each have a login: ``mongodb://a:one@host1,b:two@host2``.
            parts = (part.rpartition("@")[0].partition(":")[2] for part in f"{user}:{password}@".split(","))
            for each in {password, *parts}:
                if each and each.lower() not in (user.lower(), host.lower(), scheme.lower()):
                    yield from {each: None, unquote(each): None}
    for found in _SETTING.finditer(value):
        if is_secret_name(found[1]):
            yield found[2] or found[3] or found[4]


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
