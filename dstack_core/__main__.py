"""The command line: ``python -m dstack_core``, or ``dstack-core``."""

from __future__ import annotations

import sys

from dstack_core._command.main import main

if __name__ == "__main__":
    sys.exit(main())
