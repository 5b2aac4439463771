"""Why a run cannot start or go on."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says why and what to do."""


class RunFolderError(RunError):
    """A run folder that must not be written to."""


class RunFolderBusy(RunFolderError):
    """Another process is training in the folder."""
