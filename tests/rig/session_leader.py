"""Take the terminal on standard input as the controlling one, then become the given command.

A script of its own because Python must not run between fork and exec in a process that has threads.
"""

import fcntl
import os
import signal
import sys
import termios

NOT_FOUND = 127


def main(argv: list[str]) -> None:
    """Replace this process by the command; exit with 127 if the command does not exist."""
    # A shell that starts the tests in the background lets them, and so the jobs, ignore an interrupt.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        sys.stderr.write(f"{argv[0]}: {error.strerror}\n")
        sys.exit(NOT_FOUND)


if __name__ == "__main__":
    main(sys.argv[1:])
