"""The errors of a run."""


class RunError(RuntimeError):
    """A run cannot start or continue. The message explains why and what to do."""


class RunFolderError(RunError):
    """The run folder is in use, is not empty, or has a run with other settings."""


class RunFolderInUseError(RunFolderError):
    """Another process is training in the folder."""


class NotFiniteError(RunError):
    """The loss of a step or its gradient is not finite."""

    def __init__(self, step: int, losses: dict[str, float], image_ids: list[int]) -> None:
        values = ", ".join(f"{name} {value}" for name, value in losses.items())
        super().__init__(
            f"step {step}: the loss or its gradient is not finite ({values}); nothing was updated. If the images are "
            "right: a lower train.lr, a longer train.warmup_steps, or train.clip_norm=10"
        )
        self.step, self.image_ids = step, image_ids
