"""Run a script as one process of several, and exit immediately after it: ``run_and_leave.py SCRIPT ARGUMENTS``.

When an ordinary process exits, the destructors of process groups can wait for a thread that waits for the interpreter's lock
(github.com/pytorch/pytorch/issues/56297, in Gloo); on a busy machine some of these processes then never exit.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from pathlib import Path

if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
