"""Starting a program that heeds SIGINT, however these tests themselves were started."""

import sys

# A process started in the background inherits "ignore SIGINT", and Python keeps to it.
_HEED = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def heeding_ctrl_c(command: list[str]) -> list[str]:
    """`command` (an absolute program and its arguments) with SIGINT's default restored."""
    return [sys.executable, "-c", _HEED, *command]
