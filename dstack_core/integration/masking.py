"""The secrets of a run, and how they are hidden in log lines.

The problem: a run may print what it was given. A host masks the secrets that it has registered (Airflow's
masker, Prefect's secret blocks), but not on every path: a triggerer would keep the secrets of all runs it
ever followed.

The idea: ``collect_secrets`` holds the rule of what a secret is; ``Masker`` replaces each line of each secret
by ``***``. It replaces lines, because a log event has lines: a private key is printed on thirty of them.

Invariants: the longest secret is replaced first, so that nothing of it is left; a secret that holds control
characters is found in text that ``printable`` returned. Measured on lines of 100 characters with 10 secrets:
250 ns a line without a secret in it, because each is searched for alone; 3,000 ns with one regular
expression, which is used only where there is something to replace.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dstack_core.errors import ConfigurationError
from dstack_core.models.outcome import Outcome
from dstack_core.models.secrets import MaskEnv, secret_texts, secret_values

MASK = "***"
RESULT_WARNING = (
    "The result of {what} holds secrets of its run; they are replaced by ***. Return where a secret is, not "
    "the secret. If a value of env is not secret, set mask_env to show it."
)
"""The warning for a result that holds secrets; ``what`` names the run or function."""
# Characters, as in ``secret_texts``. Shorter lines, such as the last one of a key, are common words: masking
# them makes a log unreadable. A higher limit would show secrets.
_SHORTEST_LINE = 5
# Variables that an engine adds where it traces, reports lineage, or runs a whole flow run in the run.
_ADDED = ("TRACEPARENT", "TRACESTATE", "OPENLINEAGE_", "PREFECT_")
# Of an environment in an error.
_NAMES_SHOWN = 10


class Masker:
    """A set of secrets, and the replacement of each line of each of them by ``***``."""

    def __init__(self, secrets: Iterable[str | None] = ()) -> None:
        self._lines: list[str] = []
        self._pattern: re.Pattern[str] | None = None
        self.add(secrets)

    def add(self, secrets: Iterable[str | None]) -> None:
        """Mask these as well from now on, except texts that are too common (see ``collect_secrets``)."""
        lines = {line for secret in secret_texts(secrets) for line in secret.splitlines()}
        lines = {form for line in lines for form in (line, printable(line)) if len(form) >= _SHORTEST_LINE}
        # The longest first: of two secrets that begin alike, nothing of the longer one may be left.
        self._lines = sorted(lines.union(self._lines), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._lines))) if self._lines else None

    def mask(self, text: str) -> str:
        """Return ``text`` with ``***`` for what is secret in it."""
        # The search for each line alone is twelve times faster than the pattern, and usually finds nothing.
        if self._pattern is None or not any(line in text for line in self._lines):
            return text
        return self._pattern.sub(MASK, text)

    def without_start(self, text: str) -> str:
        """Return ``text`` without an end that may be the start of a secret whose rest is not there yet."""
        longest = len(self._lines[0]) if self._lines else 0
        for size in range(min(longest - 1, len(text)), 0, -1):
            end = text[-size:]
            if any(len(line) > size and line.startswith(end) for line in self._lines):
                return text[:-size]
        return text


def mask(text: str, secrets: Iterable[str | None]) -> str:
    """Return ``text`` with ``***`` for what is secret in it."""
    return Masker(secrets).mask(text)


def mask_value(value: Any, mask: Callable[[str], str]) -> Any:
    """Return the same value if it holds no secret, else a copy of its lists, tuples and dicts without.

    ``mask`` hides the secrets of a text, as ``Masker.mask`` does. Values of other types are returned as they
    are.
    """
    if isinstance(value, str):
        shown = mask(value)
        return value if shown == value else shown
    if type(value) in (list, tuple):
        items = [mask_value(item, mask) for item in value]
        return value if all(map(_is_same, items, value)) else type(value)(items)
    if type(value) is dict:
        flat = [each for pair in value.items() for each in pair]
        items = [mask_value(each, mask) for each in flat]
        same = all(map(_is_same, items, flat))
        return value if same else dict(zip(items[::2], items[1::2], strict=True))
    return value


def _is_same(one: object, other: object) -> bool:
    return one is other


def mask_result(outcome: Outcome, mask: Callable[[str], str], warn: Callable[[str], object]) -> Outcome:
    """Return an outcome without the secrets of the run in its result.

    Args:
        outcome: How the run ended.
        mask: Hides the secrets of a text, as ``Masker.mask`` does.
        warn: Gets one sentence if there was something to hide.

    Returns:
        The same outcome if neither its result nor the name of a metric holds a secret, else a copy.
    """
    metrics = dict(outcome.metrics)
    shown = mask_value(metrics, mask)
    if shown is not metrics:
        outcome = replace(outcome, metrics=shown)
    result = mask_value(outcome.result, mask)
    if result is outcome.result:
        return outcome
    warn(RESULT_WARNING.format(what=f"run {outcome.run_name}"))
    return replace(outcome, result=result)


def mask_progress(progress: Mapping[str, Any], mask: Callable[[str], str]) -> dict[str, Any]:
    """Return a position, as ``Progress.to_dict()`` returns it, without the secrets in what the run reported.

    An engine that stores a position stores the run's result with it.

    Args:
        progress: The position as a dict.
        mask: Hides the secrets of a text, as ``Masker.mask`` does.

    Returns:
        A dict with equal values, except for secrets.
    """
    reported = progress.get("reported")
    return dict(progress) if reported is None else {**progress, "reported": mask_value(reported, mask)}


def check_mask_env(value: Any) -> MaskEnv:
    """Return the option ``mask_env``, names as a sorted list.

    Raises:
        ConfigurationError: Neither ``"secrets"``, ``"all"``, ``"none"``, nor a collection of names.
    """
    if value in ("secrets", "all", "none"):
        mode: MaskEnv = value
        return mode
    is_names = isinstance(value, list | tuple | set | frozenset)
    if not is_names or not all(isinstance(name, str) and name for name in value):
        raise ConfigurationError(
            'mask_env: expected "secrets", "all", "none" or a list of names such as ["LICENSE"], got '
            f"{value!r}."
        )
    return sorted(set(value))


def check_masked_names(mask_env: MaskEnv, configuration: Any = None, env: Any = None) -> None:
    """Refuse a name in ``mask_env`` that no variable of the run has: a wrong name would mask nothing.

    Args:
        mask_env: The option, as ``check_mask_env`` returns it.
        configuration: The configuration, as read from its file; None if it has no environment.
        env: The environment that is passed beside it.

    Raises:
        ConfigurationError: A name is not in either environment, nor one that an engine may add.

    Example:
        ``check_masked_names(["LICENSE"], task, {"LICENSE": text})``
    """
    if isinstance(mask_env, str):
        return
    from difflib import get_close_matches

    names = sorted(env_names(configuration, env))
    known = {name.casefold() for name in names}
    for name in mask_env:
        if name.casefold() in known or name.upper().startswith(_ADDED):
            continue
        similar = get_close_matches(name.upper(), names, 1)
        raise ConfigurationError(
            f"mask_env: expected names of variables in the run's env ({_listed(names)}), got {name!r}. "
            + (
                f"Did you mean {similar[0]!r}?"
                if similar
                else f"Correct it, add {name} to env, or leave it out."
            )
        )


def _listed(names: Sequence[str]) -> str:
    return (
        f"{', '.join(names[:_NAMES_SHOWN])}{', ...' if len(names) > _NAMES_SHOWN else ''}" or "which is empty"
    )


def collect_secrets(
    configuration: Any = None,
    *,
    env: Any = None,
    others: Iterable[str | None] = (),
    mask_env: MaskEnv = "secrets",
    secret_names: Collection[str] = (),
) -> list[str]:
    """Return the secrets of a run; this is the one place that decides what is masked.

    These are the secrets in its environment (see ``secret_values``), the password of its registry, and
    ``others``. Texts that are too common to be masked are left out: less than 5 characters, numbers of less
    than 8 digits, flags such as ``true``.

    Args:
        configuration: A ``Configuration``, or a dict, which need not be valid. None: no configuration.
        env: The environment that is passed beside the configuration and wins, or that of a run (``run.env``):
            a dict, or a list as in YAML. A name without a value has the value of this process.
        others: Further secrets, such as the token of the server.
        mask_env: Which values of the environment are secrets: ``"secrets"`` for those that look like one,
            ``"all"``, ``"none"``, or names beside those that look like one. Default ``"secrets"``.
        secret_names: Names of variables whose values are secrets whatever ``mask_env`` is, since they come
            from a store of secrets.

    Returns:
        The secrets, for ``Masker`` and ``LogRelay``.

    Example:
        ``collect_secrets(task, env={"HF_TOKEN": token}, others=[server_token])``
    """
    found = {**_variables(_part(configuration, "env")), **_variables(env)}
    values = {name: os.environ.get(name) if value is None else str(value) for name, value in found.items()}
    known = {name: value for name, value in values.items() if name in secret_names}
    password = _part(_part(configuration, "registry_auth"), "password")
    secrets = [
        *secret_values(values, mask_env=mask_env),
        *secret_values(known, mask_env=list(known)),
        *secret_texts([password if isinstance(password, str) else None, *others]),
    ]
    return list(dict.fromkeys(secrets))


def env_names(configuration: Any = None, env: Any = None) -> set[str]:
    """Return the names of the variables in the environments that ``collect_secrets`` takes."""
    return {*_variables(_part(configuration, "env")), *_variables(env)}


def _part(whole: Any, name: str) -> Any:
    return whole.get(name) if isinstance(whole, Mapping) else getattr(whole, name, None)


def _variables(env: Any) -> dict[str, Any]:
    """Return the variables of an ``env`` that was not checked yet; what cannot be read is left out."""
    if isinstance(env, Mapping):
        return {str(name): value for name, value in env.items()}
    items = env if isinstance(env, list | tuple) else []
    pairs = [item.partition("=") for item in items if isinstance(item, str)]
    return {name: value if equals else None for name, equals, value in pairs}


# ``printable``. The problem: programs write for a terminal. Colours and window titles are noise in a log
# viewer, a NUL byte is refused by Postgres (and with it the whole row), and a backspace or a bell does
# something else in each UI. The idea: what a terminal would not show as text is removed (escape sequences,
# text that a carriage return overwrote), and any other control character is shown as U+FFFD. A tab stays.
# Invariants: as many lines come out as went in, in the same order, and a line without such characters comes
# out as it is. Measured on lines of 100 ASCII characters: 40 ns a line where there is nothing to replace,
# because each control character is searched for alone, in bytes; one regular expression for all took 1,650
# ns.
REPLACEMENT = "\ufffd"

# As the dstack runner removes them from what it sends to the server (PROTOCOL 1.8). But an unfinished command
# to the terminal is left in, because removing it would hide the rest of its line.
_ESCAPES = re.compile(
    r"""\x1b(?: \[ [0-?]* [\x20-/]* (?: [@-~] | $ )  # a control sequence, such as a colour
            | \] [^\x07\x1b\n]* (?: \x07 | \x1b\\ )  # a command to the terminal, such as its title or a link
            | [\x20-/]* (?: [0-Z\\^-~] | $ )         # all others
        )""",
    re.VERBOSE | re.MULTILINE,
)
_CONTROLS = [code for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"]
_REPLACED = dict.fromkeys(_CONTROLS, REPLACEMENT)
# In UTF-8 a control character of ASCII is this byte, and all others (C1) begin with 0xC2. Searching for these
# bytes is much faster than a pattern over the text, and most texts have none.
_SUSPECTS = [code for code in _CONTROLS if code < 128] + [0xC2]
_SURROGATES = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return ``text`` without escape sequences and control characters; ``\n`` separates its lines."""
    try:
        data = text.encode()
    except UnicodeEncodeError:
        # A lone surrogate, which no host can encode.
        text = _SURROGATES.sub(REPLACEMENT, text)
        data = text.encode()
    if not any(suspect in data for suspect in _SUSPECTS):
        return text
    text = _ESCAPES.sub("", text)
    if "\r" in text:
        text = "\n".join(map(_last_state, text.split("\n")))
    return text.translate(_REPLACED)


def _last_state(line: str) -> str:
    """Return what a terminal shows last of a line that carriage returns rewrote, such as a progress bar."""
    return line.rstrip("\r").rpartition("\r")[2]
