"""Run specs read by the models of a dstack server, as JSON on standard output.

The Python of the server runs this file, which imports nothing of this project. Each spec is returned as the server
stores it, or as null if it is refused.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    """Judge the run specs of standard input."""
    from dstack._internal.core.models.runs import RunSpec  # type: ignore[import-not-found]
    from dstack._internal.server.services.runs.spec import (  # type: ignore[import-not-found]
        validate_run_spec_and_set_defaults,
    )

    class User:
        ssh_public_key = "ssh-rsa KEY"

    def stored(data: Any) -> Any:
        try:
            spec = RunSpec.model_validate(data)
            validate_run_spec_and_set_defaults(User(), spec)
            spec.configuration.env.as_dict()
            return spec.model_dump(mode="json")
        except Exception:  # whatever the error is, the request fails
            return None

    json.dump([stored(data) for data in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    main()
