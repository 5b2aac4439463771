"""Reads two flags of a step, "is the loss finite" and "a process asked to stop", without making the device wait.

The flags of a step are copied to the host while the device computes the next step, and read then. So the host is at
most one step ahead. A diverged step changes no weight (train/step.py), and nothing is saved before its flags were read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from retina.data.batch import Batch
from retina.train.distributed import all_gather_list
from retina.train.errors import NotFiniteError


class _Unread(NamedTuple):
    step: int  # counts from 1
    losses: dict[str, Tensor]
    image_ids: list[int]


class StepFlags:
    """The flags of the last step that was sent, on their way to the host."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.host_flags_2 = torch.ones(2, pin_memory=self.on_cuda)
        self.copied = torch.cuda.Event() if self.on_cuda else None  # type: ignore[no-untyped-call]
        self.unread: _Unread | None = None

    def send(self, step: int, losses: dict[str, Tensor], batches: list[Batch]) -> None:
        """Start to copy `finite` and `stop` of the result of `train_step`; those sent before must have been read."""
        assert self.unread is None
        self.host_flags_2.copy_(torch.stack([losses["finite"], losses["stop"]]), non_blocking=True)
        if self.copied is not None:
            self.copied.record()
        self.unread = _Unread(step, losses, [image_id for batch in batches for image_id in batch.image_ids])

    def read(self) -> bool:
        """Whether a process asked to stop in the step that was sent; False if its flags have been read already.

        Raises NotFiniteError, on all processes, if its loss or gradient is not finite.
        """
        if self.unread is None:
            return False
        if self.copied is not None:
            self.copied.synchronize()
        (step, losses, image_ids), self.unread = self.unread, None
        finite, stop = self.host_flags_2.tolist()
        if not finite:
            raise NotFiniteError(
                step,
                {name: loss.item() for name, loss in losses.items() if name not in ("finite", "stop", "positives")},
                all_gather_list(image_ids),
            )
        return bool(stop > 0)
