"""An embedded dstack server for trying out and testing workflows without a real one.

``LocalServer`` speaks the REST protocol of dstack 0.22.5 and runs commands as local processes. It needs the
extra `local`: ``pip install "dstack-core[local]"``. ``python -m dstack_core.local`` starts one from a shell.
"""

from __future__ import annotations

from dstack_core.local.faults import Fault, Faults
from dstack_core.local.scenarios import Scenarios
from dstack_core.local.seen import SeenRun
from dstack_core.local.server import LocalServer
from dstack_core.local.virtual_time import VirtualTime

__all__ = ["Fault", "Faults", "LocalServer", "Scenarios", "SeenRun", "VirtualTime"]
