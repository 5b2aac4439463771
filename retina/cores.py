"""The processor cores of this process. Never imports torch."""

import os


def available_cores() -> int:
    """How many cores this process may use; a job of a cluster has a part of those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
