"""Carry requests to a server; knows no route."""
