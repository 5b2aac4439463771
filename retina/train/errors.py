"""Why a run cannot start or continue."""


class RunError(RuntimeError):
    """A run that cannot start or continue; the message says why and what to do."""


class RunFolderError(RunError):
    """A run folder that must not be written to."""


class RunFolderInUseError(RunFolderError):
    """Another process is training in the folder."""
