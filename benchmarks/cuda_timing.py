"""Timing of a call on a CUDA device by events."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def cuda_milliseconds(
    call: Callable[[int], object], rounds: int, warm_up: int = 3, sleep_cycles: int = 10_000_000
) -> float:
    """Median milliseconds of `call` over `rounds` calls, after `warm_up` calls that are not counted.

    The argument of `call` counts from 0, so that it can alternate between inputs. The device sleeps a few milliseconds
    before each call: the host gets ahead, and its own work is not timed.
    """
    times = []
    for i in range(warm_up + rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(sleep_cycles)
        start.record()
        call(i)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[warm_up:])
