"""The code of a run: a directory of this machine becomes a clone and a diff, or an archive."""
