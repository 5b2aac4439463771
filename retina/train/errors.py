"""The errors of a run."""


class RunError(RuntimeError):
    """A run cannot start or continue. The message explains why and what to do."""


class RunFolderError(RunError):
    """The run folder is in use, is not empty, or has a run with other settings."""


class RunFolderInUseError(RunFolderError):
    """Another process is training in the folder."""
