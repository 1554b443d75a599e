"""The command line of this package: a thin layer over the client and ``integration``."""
