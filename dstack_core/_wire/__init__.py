"""The one room that knows the wire: paths, JSON keys, errors, versions. It does no I/O."""
