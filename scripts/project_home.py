"""The address of the project, which the metadata and the READMEs of the distributions contain.

An index shows a README apart from the repository, so its links are absolute. They all begin with one address:
``python -m scripts.project_home https://forge.example.com/owner/name`` sets it everywhere.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A name that no one can own (RFC 2606); a release refuses it.
PLACEHOLDER = "https://example.com/dstack-pipelines"
FILES = (
    "pyproject.toml",
    "dstack_core/README.md",
    "providers/airflow/pyproject.toml",
    "providers/airflow/README.md",
    "providers/prefect/pyproject.toml",
    "providers/prefect/README.md",
)
_ADDRESS = re.compile(r"https://[\w.-]+(/[\w.-]+)+")


def home() -> str:
    """Return the address that is set now."""
    found: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Homepage"]
    return found


def set_home(address: str) -> None:
    """Write the address in all files. Raises ``ValueError`` for anything but one such as a forge has."""
    address = address.removesuffix("/")
    if not _ADDRESS.fullmatch(address):
        raise ValueError(f"project_home: expected https://HOST/OWNER/NAME, got {address!r}.")
    before = home()
    for file in FILES:
        path = ROOT / file
        path.write_text(path.read_text().replace(before, address))


if __name__ == "__main__":
    if sys.argv[1:]:
        set_home(sys.argv[1])
    print(home())
