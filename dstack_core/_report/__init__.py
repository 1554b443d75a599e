"""The file that a run imports as ``dstack_report`` to report results, live numbers and files."""
