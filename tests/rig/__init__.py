"""A real dstack server with simulated hosts: real runs as local processes, without containers.

The server is the unmodified package from its own environment. The hosts of its SSH fleet are simulated by
threads of the process that imports this package: an SSH daemon, the host agent (shim) and the job agent (runner).
Everything listens on loopback. `python -m tests.rig` starts one by hand.
"""

from tests.rig.server import RealServer, RigError

__all__ = ["RealServer", "RigError"]
