"""Packing a call of a Python function for a run, and reading what it returned: pure, but for reading files.

``call`` packs a call, ``modules`` and ``requirements`` what it needs, ``main`` is the program that makes the
call inside the run, and ``result`` turns what that program reported into a value or an error.
"""
