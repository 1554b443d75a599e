"""Turn a directory of this machine into what a run can start from: a clone and a diff, or an archive."""
