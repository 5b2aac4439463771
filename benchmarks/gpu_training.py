"""The training section of benchmarks/gpu.py: steps a second beside torchvision, and where the time of a step goes.

R50-FPN, 800x800, batch 16, frozen BatchNorm, stem and layer1 frozen, the same weights, images and boxes for all.
"network alone" is the compiled network of the compiled step, forward, backward of ones and optimizer, without matching
and loss. Steps run in a row without a wait in between, as in a run. No loader and no log are in any of them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from gpu_models import Rounds, Sizes, our_model, raise_if_failed, run_measurement, their_model, training_config
from gpu_report import Report
from speed import make_batch, network_alone, our_step, their_step
from torch.profiler import ProfilerActivity, profile

from retina.model import RetinaNet

EAGER, COMPILED, ALONE = "retina eager", "retina compiled", "compiled network alone"
TORCHVISION = "torchvision float32 (TF32)", "torchvision autocast", "torchvision autocast, channels-last"
THEIR_LR = 1e-7  # as retina's in the first step of its warm-up: the weights must stay good through all rounds
PROFILED = 3
# The first that fits: a kind of work, and parts of the names of its kernels (on the CPU, of its operators).
KINDS = {
    "focal loss": ("focal",),
    "matching": ("match_kernel",),
    "optimizer": ("sgd", "adam", "multi_tensor"),
    "compiled elementwise": ("triton_",),
    "convolution": ("conv", "gemm", "xmma", "cudnn", "cutlass", "nvjet", "wgrad", "dgrad", "addpadding", "nchwtonhwc"),
}


def measure(report: Report, sizes: Sizes, device: torch.device) -> None:
    """All variants in turn, then the ratios and the profile."""
    config = training_config(sizes)
    batch = make_batch(sizes.batch, sizes.side, sizes.side, config.data.pad_multiple).to(device)
    report.say(
        f"{sizes.backbone}-FPN, {sizes.side}x{sizes.side}, batch {sizes.batch}, bf16; compiler: {sizes.compiler}"
    )
    rounds = Rounds(report, sizes, device, sizes.batch)
    models: dict[str, RetinaNet] = {}

    def ours(name: str, compiled: bool) -> Callable[[], object]:
        own_config = training_config(sizes, compiled)
        models[name] = our_model(own_config, their_model(sizes, torch.device("cpu")), sizes, device)
        return our_step(models[name], batch, own_config, device)

    def theirs(bf16: bool, memory_format: torch.memory_format = torch.contiguous_format) -> Callable[[], object]:
        model = their_model(sizes, device).to(memory_format=memory_format)
        return their_step(model, batch, device, bf16, THEIR_LR)

    rounds.add(EAGER, lambda: ours(EAGER, False))
    rounds.add(COMPILED, lambda: ours(COMPILED, True))
    rounds.add(ALONE, lambda: network_alone(models[COMPILED], batch, config))
    rounds.add(TORCHVISION[0], lambda: theirs(False))
    rounds.add(TORCHVISION[1], lambda: theirs(True))
    rounds.add(TORCHVISION[2], lambda: theirs(True, torch.channels_last))
    rounds.repeat()
    for name in (EAGER, COMPILED):
        for other in TORCHVISION:
            rounds.say_ratio(name, other)
    if share := rounds.compare(COMPILED, ALONE):
        report.say(f"{COMPILED}: {share[0]:.1%} ({share[1]:.1%} to {share[2]:.1%}) of the speed of the network alone")
    for name in (COMPILED, EAGER):
        if name in rounds.calls:
            profile_calls(report, name, rounds.calls[name], device)
    raise_if_failed(report)


def profile_calls(report: Report, name: str, call: Callable[[], object], device: torch.device) -> None:
    """Device time of each kind of work, of the largest kernels, and busy against wall time; of one call."""
    on_cuda = device.type == "cuda"
    call()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda) as profiler:
        begin = time.perf_counter()
        for _ in range(PROFILED):
            call()
        if on_cuda:
            torch.cuda.synchronize()
        wall = 1e3 * (time.perf_counter() - begin) / PROFILED
    kernels: dict[str, float] = defaultdict(float)
    count = 0
    for event in profiler.key_averages():
        if is_kernel(event, on_cuda):
            time_us = event.self_device_time_total if on_cuda else event.self_cpu_time_total
            kernels[event.key] += time_us / 1e3 / PROFILED
            count += event.count
    busy = sum(kernels.values())
    kinds: dict[str, float] = defaultdict(float)
    for key, milliseconds in kernels.items():
        kinds[kind_of(key)] += milliseconds
    largest = sorted(kernels, key=lambda key: -kernels[key])[:20]
    report.put(
        f"profile of {name}", wall_ms=wall, busy_ms=busy, launches=count / PROFILED, kinds_ms=dict(kinds),
        largest_ms={key: kernels[key] for key in largest},
    )  # fmt: skip
    report.say(
        f"profile of {name}: wall {wall:.2f} ms under the profiler, device busy {busy:.2f} ms, "
        f"{count / PROFILED:.0f} kernels"
    )
    for kind in sorted(kinds, key=lambda kind: -kinds[kind]):
        report.say(f"  {kind:24} {kinds[kind]:9.3f} ms {kinds[kind] / busy:7.1%}")
    report.say("  largest:")
    for key in largest:
        report.say(f"  {kernels[key]:9.3f} ms  {key[:110]}")


def is_kernel(event: Any, on_cuda: bool) -> bool:
    """Whether an entry of the profile is a kernel; operators and named ranges repeat the time of their kernels."""
    if not on_cuda:
        return bool(event.self_cpu_time_total > 0)
    is_range = getattr(event, "is_user_annotation", False) or event.key.startswith(
        ("aten::", "Optimizer.", "## ", "Torch-Compiled")
    )
    return event.device_type == torch.autograd.DeviceType.CUDA and event.self_device_time_total > 0 and not is_range


def kind_of(kernel: str) -> str:
    """The kind of work of a kernel, by its name."""
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "everything else")


if __name__ == "__main__":
    run_measurement(measure)
