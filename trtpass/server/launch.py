"""Become a program that gets SIGTERM when its parent dies: ``python -IS launch.py PARENT PROGRAM ARGUMENT...``.

A process of its own sets this up, since code between fork and exec is not safe in a parent with threads. Linux binds
the signal to the thread that started the child: it has to live as long as the child shall.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):  # it died before the call
        sys.exit(1)
    os.execv(sys.argv[2], sys.argv[2:])
