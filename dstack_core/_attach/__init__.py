"""The SSH connection to a run's container: the one room with keys, sockets and threads."""
