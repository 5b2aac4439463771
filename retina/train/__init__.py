"""Training: one step, the loop around it, the state that changes, and the run folder. It imports nothing of studies."""

from retina.train.errors import RunError, RunFolderError, RunFolderInUseError
from retina.train.loop import train
from retina.train.schedule import build_optimizer
from retina.train.step import train_step

__all__ = ["RunError", "RunFolderError", "RunFolderInUseError", "build_optimizer", "train", "train_step"]
