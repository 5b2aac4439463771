"""A process that ends with the one that started it, however that ends."""

from __future__ import annotations

import fcntl
import os
import signal
import threading


def end_with_parent() -> None:
    """From now on this process is killed when its standard input closes, which a pipe does however its writer ends: a
    training whose owner is gone must not write on beside the next owner's."""
    if hasattr(fcntl, "F_SETSIG"):  # Linux does it even while an import keeps all threads waiting
        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)

    def wait() -> None:  # elsewhere; under torchrun, whose processes share an input; and where it has closed already
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
