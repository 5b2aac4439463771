"""Ends a process together with the process that started it, even if that one was killed."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time


def end_with_parent() -> None:
    """From now on this process is killed when its standard input closes.

    The standard input must be a pipe, which closes however the parent ends. A run that outlived its parent would write
    into the folder of the run that replaces it.
    """
    if hasattr(fcntl, "F_SETSIG"):  # Linux: the signal comes even while an import holds up all threads
        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)

    # For other systems, for torchrun (whose processes share one input), and for an input that is closed already.
    def wait_for_close() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait_for_close, daemon=True).start()


def end_with_torchrun() -> None:
    """From now on this process ends within a second after torchrun, if torchrun started it.

    A killed torchrun leaves its processes behind. They would go on training, and hold the lock of the run folder when
    the user starts the same command again.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()

    def wait_for_end() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        print("error: torchrun ended without stopping this process, so it ends now", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()
