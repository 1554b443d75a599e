"""Keep a secret file that several processes may want to create at once."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def keep_or_create(path: Path, make: Callable[[], bytes]) -> bytes:
    """Return the contents of ``path``; where it is missing it is made first, readable by its owner alone.

    Of several processes that make it at once one wins, and all return what that one wrote. Its directory
    is made with 0700. Raises ``OSError``.
    """
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The name appears only with the whole contents, and a link never replaces what is there already.
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(make())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        Path(draft).unlink()
    return path.read_bytes()
