"""The names and markers that identify the owner of a run.

The problem: a server identifies a run by its name, and any user of the project can take a name. An engine
that executes a job again must find the run of the execution before, and must never adopt, stop or replace the
run of another owner.

The idea: the client chooses the name before it submits, and writes a marker on the run (it travels in
``configuration_path``). Both are computed from what the engine knows of the job alone, so that every process
computes the same ones. Name and marker together are a ``RunRef``. A marker reads
``<engine>:<what owns the run>/<which try of it>``, such as ``airflow:train/manual__1/fit/2of3#5f1c9a`` or
``prefect:flow_run/<id>/stop/3b0f92-0/1``.

Invariant: what a released version generates stays as it is, byte for byte. Otherwise a job that is retried
after an upgrade submits a second run beside the first. Source: PROTOCOL 1.4.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256

# The server takes names of the form [a-z][a-z0-9-]{1,40} (PROTOCOL 1.4).
LONGEST_NAME = 41

_NOT_IN_NAMES = re.compile(r"[^a-z0-9]+")


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
    """

    base: str
    stem: str
    fixed_name: str | None = None

    def ref(self, number: int) -> RunRef:
        """Return the identity of the run of that attempt; the first has number 1."""
        name = self.fixed_name or (self.base if number == 1 else f"{self.base}-{number}")
        return RunRef(name, f"{self.stem}/{number}", generated=self.fixed_name is None)

    def number_of(self, marker: str | None) -> int | None:
        """Return the number of the attempt that has this marker, None if another owner has it."""
        stem, _, number = (marker or "").rpartition("/")
        return int(number) if stem == self.stem and number.isdecimal() else None


def short_hash(text: str, length: int = 12) -> str:
    """Return the first hex digits of the SHA-256 hash of a text.

    Twelve digits (48 bits) are enough for the runs of a project; six are enough beside an id.
    """
    return sha256(text.encode()).hexdigest()[:length]


def slug(text: str | None, *, default: str, longest: int = LONGEST_NAME) -> str:
    """Return a text in the form in which a run's name may begin.

    Args:
        text: Any text; it is lowercased, and everything but ASCII letters and digits becomes a hyphen.
        default: What to return if the result would not begin with a letter.
        longest: How many characters of the text are kept.

    Example:
        ``slug("Train: daily", default="run")`` returns ``"train-daily"``.
    """
    kept = _NOT_IN_NAMES.sub("-", (text or "").lower())[:longest].strip("-")
    return kept if kept[:1].isalpha() else default


def make_marker(engine: str, *path: str) -> str:
    """Return the marker ``<engine>:<path>``, the parts of the path joined by slashes."""
    return f"{engine}:{'/'.join(path)}"


def read_marker(marker: str | None, engine: str) -> tuple[str, ...]:
    """Return the parts of a marker's path; an empty tuple for another engine's, and for no marker."""
    begin = make_marker(engine)
    return tuple(marker.removeprefix(begin).split("/")) if marker and marker.startswith(begin) else ()
