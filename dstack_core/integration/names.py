"""The names and markers that say whose a run is.

The problem: a server knows a run by its name, and any user of the project can take a name. An engine that
executes a job again must find the run of the execution before, and must never adopt, stop or replace a run of
somebody else.

The idea: the client chooses the name before it submits, and writes a marker on the run (it travels in
``configuration_path``). Both are computed from what the engine knows of the job alone, so that every process
computes them alike. Name and marker together are a ``RunRef``. A marker reads
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

    ``name`` (str) is the run's name and ``marker`` (str) what its owner wrote on it at the submission.
    ``generated`` (bool) says that the name was made for this one run, so that no other run can have it: such
    a run is stopped by name without a request before the stop. Source: PROTOCOL 1.4.
    """

    name: str
    marker: str
    generated: bool = False


@dataclass(frozen=True, slots=True)
class AttemptNames:
    """The names and markers of all attempts of one job.

    ``base`` (str) is the generated name of the first attempt, which later ones extend by their number.
    ``stem`` (str) is what all their markers begin with. ``fixed_name`` (str) is a name that the user chose
    for all attempts, or None.
    """

    base: str
    stem: str
    fixed_name: str | None = None

    def ref(self, number: int) -> RunRef:
        """Return which run the attempt of that number is; the first has number 1."""
        name = self.fixed_name or (self.base if number == 1 else f"{self.base}-{number}")
        return RunRef(name, f"{self.stem}/{number}", generated=self.fixed_name is None)

    def number_of(self, marker: str | None) -> int | None:
        """Return which attempt has this marker; None when it is another owner's."""
        stem, _, number = (marker or "").rpartition("/")
        return int(number) if stem == self.stem and number.isdecimal() else None


def short_hash(text: str, length: int = 12) -> str:
    """Return the first hex digits of the SHA-256 hash of a text.

    Twelve digits tell the runs of a project apart; six are enough beside an id.
    """
    return sha256(text.encode()).hexdigest()[:length]


def slug(text: str | None, *, default: str, longest: int = LONGEST_NAME) -> str:
    """Return a text as a part of a run's name that the name may begin with.

    Args:
        text: Any text; letters become small, and everything else but ASCII digits becomes a hyphen.
        default: What is returned if nothing is left that begins with a letter.
        longest: How many characters of the text are kept.
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
