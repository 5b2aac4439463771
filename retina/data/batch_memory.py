"""The memory of the images of batches, which loader workers share with the training process and use again.

A worker uses the memory of a batch again when the training process has freed the batch. The pages of new memory cost
more time than the resize that fills them.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from retina.data.annotations import DataError

Slot = tuple[int, int]  # worker, number
SLOTS = 8  # of a worker: more than the batches that it makes ahead


class BatchMemory:
    """Slots of memory, which a worker takes and the training process gives back.

    Each worker, or the training process if there is none, has a few slots. A byte for each, which all processes see, is
    1 while a batch uses its memory.
    """

    def __init__(self, workers: int) -> None:
        with torch.inference_mode(False):  # `give_back` may be called outside of the inference that made the batch
            self._used = torch.zeros(max(1, workers), SLOTS, dtype=torch.uint8)
        self._used.share_memory_()  # type: ignore[no-untyped-call]
        self._slots: dict[int, Tensor] = {}  # of this process

    def take(self, size: int) -> tuple[Tensor, Slot | None]:
        """uint8 (size,) with any content, and its slot (worker, number), or None if all are in use.

        Raises DataError if the system has no shared memory left.
        """
        memory = torch.empty(size, dtype=torch.uint8)  # has no pages before it is written
        info = get_worker_info()
        worker = 0 if info is None else info.id
        free = (self._used[worker] == 0).nonzero()
        if not len(free):
            return memory, None
        number = int(free[0])
        if number not in self._slots or len(self._slots[number]) < size:
            if info is not None:
                _share(memory)
            self._slots[number] = memory
        self._used[worker, number] = 1
        return self._slots[number][:size], (worker, number)

    def give_back(self, slot: Slot) -> None:
        self._used[slot[0], slot[1]] = 0

    def give_back_with(self, images: Tensor, slot: Slot) -> Tensor:
        """The same images; the slot is free when no tensor or array uses their memory any more."""
        array = images.numpy()
        weakref.finalize(array, self.give_back, slot).atexit = False
        return torch.from_numpy(array)  # refers to `array`, as all tensors do that are made from it


def _share(memory: Tensor) -> None:
    try:
        memory.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise DataError(
            f"no shared memory for a batch of {len(memory) / 2**20:.0f} MiB ({error}); give /dev/shm more space "
            "(docker run --shm-size=8g), or use fewer data.workers: with 0 none is needed"
        ) from None
