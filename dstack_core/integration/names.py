"""The names and markers that identify the owner of a run.

The problem: a server identifies a run by its name, and any user of the project can take a name. An engine
that executes a job again must find the run of the execution before, and must never adopt, stop or replace the
run of another owner.

The idea: the client chooses the name before it submits, and writes a marker on the run (it travels in
``configuration_path``). Both are computed from what the engine knows of the job alone, so that every process
computes the same ones. Name and marker together are a ``RunRef``. A marker reads
``<engine>:<what owns the run>/<which try of it>``, such as ``airflow:train/manual__1/fit/2of3#5f1c9a`` or
``prefect:flow_run/<id>/stop/3b0f92-0/1``.

A generated name is for people: ``run_name`` makes ``train-nightly-train-9k2f01xq`` of what a job is called
and a hash of what it is.

Invariant: a marker that a released version generates stays as it is, byte for byte, and a name that it
generated is still looked up (``AttemptNames.former_base``). Otherwise a job that is executed again after an
upgrade submits a second run beside the first. Source: PROTOCOL 1.4.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

from dstack_core.models.tags import lowercase_ascii

# The server takes names of the form [a-z][a-z0-9-]{1,40} (PROTOCOL 1.4).
LONGEST_NAME = 41

_NOT_IN_NAMES = re.compile(r"[^a-z0-9]+")
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
# 41 bits. Two of 10,000 runs of one task have the same name once in 40,000 cases; with six digits it would be
# once in 40, and a finished run would be replaced.
_HASH_LENGTH = 8
# Beside this hash, in the name of a step whose first name is too long for a number.
_STEP_HASH_LENGTH = 8


@dataclass(frozen=True, slots=True)
class RunRef:
    """The identity of one run: no other run of the project has this name and this marker.

    Attributes:
        name: The run's name.
        marker: What its owner wrote on it when it was submitted.
        generated: Whether the name was made for this one run, so that no other run can have it. Such a run is
            stopped by name without a request before the stop.

    Source: PROTOCOL 1.4.
    """

    name: str
    marker: str
    generated: bool = False


@dataclass(frozen=True, slots=True)
class AttemptNames:
    """The names and markers of all attempts of one job.

    Attributes:
        base: The generated name of the first attempt, which later ones extend by their number.
        stem: The text with which all their markers begin.
        fixed_name: A name that the user chose for all attempts, or None.
        former_base: What ``base`` was in a version before this one, or None. It is set where an earlier
            execution may have submitted a run: an attempt without a run is then looked up under that name,
            too, which takes one request.
    """

    base: str
    stem: str
    fixed_name: str | None = None
    former_base: str | None = None

    def ref(self, number: int) -> RunRef:
        """Return the identity of the run of that attempt; the first has number 1."""
        name = self.fixed_name or _numbered(self.base, number)
        return RunRef(name, f"{self.stem}/{number}", generated=self.fixed_name is None)

    def former_ref(self, number: int) -> RunRef | None:
        """Return the identity that an earlier version gave to the run of that attempt, or None."""
        if self.former_base is None or self.fixed_name is not None:
            return None
        return RunRef(_numbered(self.former_base, number), f"{self.stem}/{number}", generated=True)

    def ref_of(self, number: int, name: str) -> RunRef:
        """Return the identity of the run of that attempt that has this name."""
        former = self.former_ref(number)
        return former if former is not None and former.name == name else self.ref(number)

    def number_of(self, marker: str | None) -> int | None:
        """Return the number of the attempt that has this marker, None if another owner has it."""
        stem, _, number = (marker or "").rpartition("/")
        return int(number) if stem == self.stem and number.isdecimal() else None


def step_ref(ref: RunRef, number: int) -> RunRef:
    """Return the identity of the run of a step; ``ref`` is that of step 1.

    Example:
        ``step_ref(RunRef("train", "plain:nightly/1"), 2)`` is
        ``RunRef("train-s2", "plain:nightly/1/step2")``.
    """
    if number == 1:
        return ref
    suffix = f"-s{number}"
    name = ref.name
    if len(name) + len(suffix) > LONGEST_NAME:
        room = LONGEST_NAME - len(suffix) - _STEP_HASH_LENGTH - 1
        name = f"{name[:room].rstrip('-')}-{short_hash(name, _STEP_HASH_LENGTH)}"
    return RunRef(f"{name}{suffix}", f"{ref.marker}/step{number}", generated=ref.generated)


def short_hash(text: str, length: int = 12) -> str:
    """Return the first hex digits of the SHA-256 hash of a text.

    Twelve digits (48 bits) are enough for the runs of a project; six are enough beside an id.
    """
    return sha256(text.encode()).hexdigest()[:length]


def run_name(
    parts: Iterable[str | None], identity: str, *, suffix: str = "", longest: int = LONGEST_NAME
) -> str:
    """Return a run's name that people can read: what the job is called, and a hash of what it is.

    Args:
        parts: What the job is called, from the general to the special, such as its DAG and its task. Accents
            are dropped; what ASCII does not have is left out, and so is a part of which nothing is kept. If
            they do not fit, the longer ones are cut, so that each keeps its beginning.
        identity: What makes the job different from every other, in any form; the hash is made of it.
        suffix: What follows the parts, such as the index of a mapped task. It is never cut.
        longest: How many characters the name may have, 16 or more.

    Returns:
        A name of the form that servers take; equal arguments return equal names, in every process.

    Example:
        ``run_name(["etl", "train"], "etl/manual__1/train/1")`` returns ``"etl-train-1adhm5xc"``.
    """
    number = int.from_bytes(sha256(identity.encode()).digest()[:8])
    digits = ""
    for _ in range(_HASH_LENGTH):
        number, digit = divmod(number, len(_DIGITS))
        digits += _DIGITS[digit]
    kept = [part for part in map(_kept, parts) if part]
    # A name begins with a letter.
    if not kept or not kept[0][0].isalpha():
        kept.insert(0, "run")
    end = _kept(suffix)
    room = longest - _HASH_LENGTH - len(kept) - (len(end) + 1 if end else 0)
    shown = [part.strip("-") for part in _shortened(kept, max(room, len(kept)))]
    return "-".join([*(part for part in shown if part), *([end] if end else []), digits])


def _numbered(base: str, number: int) -> str:
    return base if number == 1 else f"{base}-{number}"


def _kept(text: str | None) -> str:
    """Return what a name can keep of a text: ASCII letters and digits, with hyphens between them."""
    return _NOT_IN_NAMES.sub("-", lowercase_ascii(text or "")).strip("-")


def _shortened(parts: list[str], room: int) -> list[str]:
    """Return the parts cut to ``room`` characters together; a short part is cut last."""
    lengths = [0] * len(parts)
    for left, index in zip(
        range(len(parts), 0, -1), sorted(range(len(parts)), key=lambda i: len(parts[i])), strict=True
    ):
        # An equal share of what the shorter ones have left; the longest part gets the rest.
        lengths[index] = min(len(parts[index]), max(room // left, 1))
        room -= lengths[index]
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]


def slug(text: str | None, *, default: str, longest: int = LONGEST_NAME) -> str:
    """Return a text in the form in which a run's name may begin.

    Args:
        text: Any text; it is lowercased, and everything but ASCII letters and digits becomes a hyphen.
        default: What to return if the result would not begin with a letter.
        longest: How many characters of the text are kept.

    Example:
        ``slug("Train: daily", default="run")`` returns ``"train-daily"``.
    """
    # Unlike in ``run_name``, a letter with an accent is not kept: names that exist were made without it.
    kept = _NOT_IN_NAMES.sub("-", (text or "").lower())[:longest].strip("-")
    return kept if kept[:1].isalpha() else default


def make_marker(engine: str, *path: str) -> str:
    """Return the marker ``<engine>:<path>``, the parts of the path joined by slashes."""
    return f"{engine}:{'/'.join(path)}"


def read_marker(marker: str | None, engine: str) -> tuple[str, ...]:
    """Return the parts of a marker's path; an empty tuple for another engine's, and for no marker."""
    begin = make_marker(engine)
    return tuple(marker.removeprefix(begin).split("/")) if marker and marker.startswith(begin) else ()
