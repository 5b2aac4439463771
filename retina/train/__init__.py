"""Training: one step, the loop around it, what changes from step to step, and the run folder. Knows no study."""

from retina.train.errors import RunError
from retina.train.loop import train
from retina.train.step import train_step

__all__ = ["RunError", "train", "train_step"]
