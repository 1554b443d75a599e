"""Carry requests to a server, whatever they are about: with ``requests`` and with ``httpx``."""
