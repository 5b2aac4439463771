"""The inference section of benchmarks/gpu.py: images a second with and without NMS, beside torchvision, for each batch.

The class bias is shifted until about 1,000 class scores of an image pass the threshold: NMS has work to do, as with
trained weights. torchvision runs under bf16 autocast with its own threshold, top candidates and NMS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from gpu_models import (
    Rounds,
    Sizes,
    our_model,
    raise_if_failed,
    run_measurement,
    spread_outputs,
    their_model,
    training_config,
)
from gpu_report import Report
from speed import make_batch, our_eval, their_eval


def measure(report: Report, sizes: Sizes, device: torch.device) -> None:
    """A table for each batch size."""
    report.say(f"{sizes.backbone}-FPN, {sizes.side}x{sizes.side}, bf16; compiler: {sizes.compiler}")
    for size in sizes.inference_batches:
        torch.compiler.reset()  # frees the graphs of the batch size before
        measure_batch(report, sizes, device, size)
    raise_if_failed(report)


def measure_batch(report: Report, sizes: Sizes, device: torch.device, size: int) -> None:
    """All variants in turn."""
    config = training_config(sizes)
    batch = make_batch(size, sizes.side, sizes.side, config.data.pad_multiple).to(device)
    theirs = their_model(sizes, device)
    passed = spread_outputs(theirs, config, batch, sizes)
    report.say(f"batch {size}: {passed:.0f} class scores of an image above the threshold")
    report.put(f"scores above the threshold, batch {size}", per_image=passed)
    forward = replace(sizes, gflop=sizes.gflop and 297.0)  # counted for resnet50 at 800x800, one image
    rounds = Rounds(report, forward, device, size)
    models = {
        compiled: our_model(training_config(sizes, compiled), theirs, sizes, device) for compiled in (False, True)
    }

    def ours(compiled: bool, detections: bool) -> Callable[[], Callable[[], object]]:
        return lambda: our_eval(models[compiled], batch, training_config(sizes, compiled), device, detections)

    torchvision = f"torchvision autocast with NMS, batch {size}"
    for compiled in (False, True):
        for detections in (False, True):
            name = (
                f"retina {'compiled' if compiled else 'eager'} {'with' if detections else 'without'} NMS, batch {size}"
            )
            rounds.add(name, ours(compiled, detections))
    rounds.add(torchvision, lambda: their_eval(theirs, batch, device, True))
    rounds.repeat()
    for kind in ("eager", "compiled"):
        rounds.say_ratio(f"retina {kind} with NMS, batch {size}", torchvision)


if __name__ == "__main__":
    run_measurement(measure)
