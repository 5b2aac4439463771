"""Training: one step, the loop around it, the state that changes, and the run folder. It imports nothing of studies."""

from retina.train.errors import RunError
from retina.train.loop import train
from retina.train.step import train_step

__all__ = ["RunError", "train", "train_step"]
