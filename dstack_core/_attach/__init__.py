"""Reach a run's container over SSH: the one room with keys, sockets and threads."""
