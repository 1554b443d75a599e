"""Run a flow from its bundle: this file is sent to the machine, which does not have this package.

The checks come first, in an order in which each error is the cause: Python 3.8 can read this file, the pickle
needs the Python that wrote it, and Prefect must be there. Then Prefect's own runner takes over.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

# Without an image of the user's, the machine has Prefect's own, unless its server starts plain processes.
_PUT_FIRST = "Start the embedded dstack server with a Python"


def problem(wanted: dict[str, Any], found: str) -> str | None:
    """Return why this Python cannot run the flow, or None; ``found`` is its minor version."""
    key = wanted["image_key"]
    where = "in this image" if key else f"in {sys.executable}"
    if found != wanted["python"]:
        choose = "Choose an image" if key else _PUT_FIRST
        return (
            f"python: expected {wanted['python']}, which pickled the flow, got {found} {where}. "
            f"{choose} with Python {wanted['python']}, or call the flow with Python {found}."
        )
    try:
        import prefect
    except ImportError as error:
        return (
            f"prefect: expected Prefect {wanted['prefect']} {where}, got none ({error}). "
            f'Install it with commands=["pip install prefect=={wanted["prefect"]}"], or '
            + (f"drop {key}." if key else f"{_PUT_FIRST[0].lower()}{_PUT_FIRST[1:]} with Prefect.")
        )
    try:
        import prefect.bundles
    except ImportError:
        return (
            f"prefect: expected Prefect {wanted['prefect']} {where}, got {prefect.__version__}, "
            f'which runs no bundles. Install it with commands=["pip install prefect=={wanted["prefect"]}"].'
        )
    return None


def hide_secrets() -> None:
    """Mask the log of this process."""
    from dstack_flow_secrets import hider  # type: ignore[import-not-found]  # It is in this folder.

    hider()


def main(folder: Path) -> int:
    """Run the flow of the bundle in ``folder``; return the exit status.

    It is 0 for a flow that fails: Prefect has its state, and the machine did what it had to.
    """
    try:
        wanted = json.loads((folder / "machine.json").read_text())
        os.environ.update(wanted.pop("environment"))
        os.environ["DSTACK_FLOW_SECRETS"] = json.dumps(wanted.pop("secrets"))
        found = "{}.{}".format(*sys.version_info)
        error = problem(wanted, found)
        if error is not None:
            sys.stderr.write(f"{error}\n")
            return 1
        hide_secrets()
        from prefect.bundles import execute_bundle_from_file

        execute_bundle_from_file(str(folder / "bundle.json"))
        return 0
    finally:
        # On a machine of one's own the folder, which may hold an API key, would stay.
        shutil.rmtree(folder, ignore_errors=True)


# The process that runs the flow, and those of its task runners, import this file again.
if __name__ == "__mp_main__":
    hide_secrets()
if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent))
