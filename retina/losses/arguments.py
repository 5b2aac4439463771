"""Argument checks of the losses.

Values inside tensors are checked only on the CPU in eager mode. On CUDA such a check would make the host wait for the
device; under torch.compile and torch.func the values are not available.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["none", "mean", "sum"]


def can_read_values(tensor: Tensor) -> bool:
    """Whether the values of `tensor` can be read without waiting for a device or breaking a trace."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not in_functorch_transform()


def in_functorch_transform() -> bool:
    """Whether a torch.func transform (vmap, grad, ...) is active."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active


def check_number(
    name: str, value: float, low: float, high: float = math.inf, open_low: bool = False, hint: str = ""
) -> None:
    """Raises ValueError unless `value` is a finite number, of Python or numpy, with low <= value <= high.

    `open_low`: `low` itself is not accepted. `hint`: the end of the message.
    """
    # Not math.isfinite: torch.compile cannot trace it for a number that changes between calls, which is symbolic there.
    valid = isinstance(value, numbers.Real) and -math.inf < value < math.inf and low <= value <= high
    if not valid or (open_low and value == low):
        bound = f" above {low:g}" if open_low else f" of at least {low:g}" if low > -math.inf else ""
        bound = bound if high == math.inf else f" from {low:g} to {high:g}"
        raise ValueError(f"{name}: given {value!r}, expected a finite number{bound}{hint}")


def check_count(name: str, value: int, low: int = 1) -> None:
    """Raises ValueError unless `value` is an integer of at least `low`."""
    if not isinstance(value, numbers.Integral) or value < low:
        raise ValueError(f"{name}: given {value!r}, expected an integer of at least {low}")


def check_ignore_index(ignore_index: int) -> None:
    """Raises ValueError unless `ignore_index` is an integer."""
    if not isinstance(ignore_index, numbers.Integral):
        raise ValueError(
            f"ignore_index: given {ignore_index!r}, expected an integer; one that no target has ignores nothing"
        )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: given {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_tensor(name: str, value: object) -> None:
    """Raises ValueError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: given {type(value).__name__}, expected a tensor")


def check_floats(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless `tensor` has a floating dtype and at least one dimension."""
    check_tensor(name, tensor)
    if not tensor.is_floating_point() or tensor.dim() < 1:
        raise ValueError(
            f"{name}: given {tensor.dtype} of shape {tuple(tensor.shape)}, expected floats of at least 1 dimension"
        )


def check_avg_factor(avg_factor: float | Tensor | None, reduction: str) -> None:
    """Raises ValueError unless None, or one positive, finite value with reduction "mean"."""
    if avg_factor is None:
        return
    if reduction != "mean":
        raise ValueError(f"avg_factor is the divisor of reduction 'mean'; given with reduction {reduction!r}")
    if isinstance(avg_factor, Tensor):
        if avg_factor.numel() != 1:
            raise ValueError(f"avg_factor: given shape {tuple(avg_factor.shape)}, expected one value")
        if not can_read_values(avg_factor):
            return
        avg_factor = float(avg_factor.detach())
    hint = "; for a batch without objects: max(1, positives), or positives.clamp(min=1) for a tensor"
    check_number("avg_factor", avg_factor, 0, open_low=True, hint=hint)


def check_class_ids(targets: Tensor, num_classes: int, ignore_index: int, background: bool) -> None:
    """Raises ValueError for a class id other than 0..K-1, K (if `background`) and `ignore_index`; on the CPU only."""
    if not can_read_values(targets):
        return
    targets = targets.long()  # as uint8, 255 would equal -1
    highest = num_classes if background else num_classes - 1
    invalid = ((targets < 0) | (targets > highest)) & (targets != ignore_index)
    if invalid.any():
        index = tuple(invalid.nonzero()[0].tolist())
        accepted = f"0..{num_classes - 1}" + (f", {num_classes} for background" if background else "")
        raise ValueError(
            f"targets: class id {int(targets[index])} at {index}, expected {accepted} or {ignore_index} (ignored)"
        )


def check_labels(targets: Tensor, ignore_index: int | None = None) -> None:
    """Raises ValueError for floats outside 0..1 or NaN, and for integers other than 0, 1 and `ignore_index`.

    On the CPU only.
    """
    if not can_read_values(targets) or not targets.numel() or targets.dtype == torch.bool:
        return
    if targets.is_floating_point():
        low, high = (float(value) for value in torch.aminmax(targets))
        if not (low >= 0 and high <= 1):
            raise ValueError(f"targets: labels from {low:g} to {high:g}, expected 0 to 1")
        return
    targets = targets.long()
    invalid = (targets != 0) & (targets != 1) & (targets != ignore_index)
    if invalid.any():
        index = tuple(invalid.nonzero()[0].tolist())
        raise ValueError(f"targets: label {int(targets[index])} at {index}, expected 0, 1 or {ignore_index} (ignored)")


def as_tensor(name: str, values: object, kind: str, dtype: torch.dtype | None = None) -> Tensor:
    """Returns `values` as a tensor; raises ValueError for anything but a tensor, an array or a sequence of `kind`."""
    try:
        return torch.as_tensor(values, dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name}: given {type(values).__name__}, expected a tensor, an array or a sequence of {kind} ({error})"
        ) from error


def dimension_hint(name: str, shape: torch.Size, logits: torch.Size) -> str:
    """The end of a message about a wrong shape: where a dimension of size 1 is missing, as in masks of one channel."""
    for dim, index in ((1, ":, None"), (len(shape), "..., None")):
        if shape and (*shape[:dim], 1, *shape[dim:]) == logits:
            return f"; add a dimension: {name}[{index}]"
    return ""


def per_class_tensor(
    name: str,
    values: float | Sequence[float] | Tensor,
    logits: Tensor,
    high: float = math.inf,
    dim: int = -1,
    hint: str = "",
) -> Tensor:
    """Returns `values` as a tensor (K,) on the device of `logits`, K = `logits.shape[dim]`; a sequence becomes float64.

    Raises ValueError for a wrong shape, or for values outside 0..high, which ends in `hint` (checked on the CPU only).
    """
    tensor = values if isinstance(values, Tensor) else as_tensor(name, values, "numbers, or one number", torch.float64)
    classes = logits.shape[dim]
    tensor = tensor.expand(classes) if tensor.dim() == 0 else tensor
    if tensor.shape != (classes,):
        raise ValueError(f"{name}: given shape {tuple(tensor.shape)}, expected one value for each of {classes} classes")
    if can_read_values(tensor) and not ((tensor >= 0) & (tensor <= high) & tensor.isfinite()).all():
        bound = "finite and at least 0" if high == math.inf else f"from 0 to {high:g}"
        smallest, largest = float(tensor.detach().min()), float(tensor.detach().max())
        raise ValueError(f"{name}: given values from {smallest:g} to {largest:g}, expected {bound}{hint}")
    return tensor.to(logits.device)
