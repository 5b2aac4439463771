"""The number of examples of each class, and class weights and initial biases from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from retina.losses.arguments import as_tensor, check_choice, check_count

Scheme = Literal["balanced", "inverse", "inverse_sqrt", "effective_number"]
Zero = Literal["error", "ignore", "smooth"]
Normalize = Literal["classes", "examples"]


def class_counts(labels: Sequence[int] | Tensor, num_classes: int) -> Tensor:
    """Returns the number of examples of each class, int64 (K,), on the CPU.

    No labels give zeros, so the counts of the parts of a data set can be added.

    Args:
        labels: class ids 0..K-1, integers of any shape. Ignored labels and background must be dropped before.
        num_classes: K.

    Raises: ValueError for labels other than integers from 0 to K-1, with the values and how often they occur. Booleans
        are refused, because they may be two classes or a one-hot matrix; so are one-hot integers (N, K).
    """
    check_count("num_classes", num_classes)
    values = as_tensor("labels", labels, "integers")
    if not isinstance(labels, Tensor) and not values.numel():  # torch makes floats of []
        values = values.long()
    if values.dtype == torch.bool:
        raise ValueError(
            "labels: given torch.bool, expected integers: labels.long() if they are two classes; a one-hot matrix "
            "(N, K) has the counts labels.sum(0)"
        )
    if values.is_floating_point() or values.is_complex():
        raise ValueError(f"labels: given {values.dtype}, expected integers: labels.long() if they are class ids")
    for dim in {1, values.dim() - 1} if values.dim() > 1 and values.numel() else ():
        if values.shape[dim] == num_classes > 1 and _is_one_hot(values, dim):
            raise ValueError(
                f"labels: given shape {tuple(values.shape)}, one-hot in dimension {dim}; expected class ids: "
                f"labels.argmax({dim}), or labels.flatten() if they are class ids"
            )
    values = values.flatten().long().cpu()
    outside = Counter(values[(values < 0) | (values >= num_classes)].tolist())
    if outside:
        shown = _shorten([f"{label} ({times} x)" for label, times in sorted(outside.items())])
        raise ValueError(
            f"labels: {outside.total()} of {len(values)} are not in 0..{num_classes - 1}: {shown}; "
            f"drop ignored labels and background first: labels[labels != {min(outside)}]"
        )
    return torch.bincount(values, minlength=num_classes)


def class_weights(
    counts: Sequence[float] | Tensor,
    scheme: Scheme = "balanced",
    *,
    beta: float = 0.999,
    zero: Zero = "error",
    normalize: Normalize | None = None,
) -> Tensor:
    """Returns a weight for each class, float32 (K,), on the CPU; rarer classes get larger weights.

    Args:
        counts: (K,) integers or floats, the number of examples of each class: finite, at least 0, and at least one
            above 0. For labels: `class_weights(class_counts(labels, K))`.
        scheme: with n_c examples of class c and n in total: "balanced" n / (K n_c), as compute_class_weight of
            scikit-learn; "inverse" 1 / n_c; "inverse_sqrt" 1 / sqrt(n_c); "effective_number"
            (1 - beta) / (1 - beta^n_c) (Cui et al., CVPR 2019, arXiv 1901.05555).
        beta: parameter of "effective_number", at least 0 and below 1. Classes with more than a few times 1 / (1 - beta)
            examples get equal weights; near 1 the weights approach "inverse".
        zero: how to treat a class without examples: "error" raises; "ignore" gives it weight 0 and does not count it
            in K; "smooth" adds 1 to the count of every class.
        normalize: None; "classes" scales the weights to an average of 1 over the classes that have examples;
            "examples" to an average of 1 over the examples, so that the learning rate need not change.

    Raises: ValueError for invalid arguments, with the classes and values concerned.
    """
    if not isinstance(scheme, str):  # the number of classes, which an earlier version had here
        raise ValueError(
            f"scheme: given {scheme!r}, expected one of {', '.join(get_args(Scheme))}; a number of classes is "
            f"no longer an argument; {_COUNTS_ONLY}"
        )
    check_choice("scheme", scheme, get_args(Scheme))
    check_choice("zero", zero, get_args(Zero))
    if normalize is not None:
        check_choice("normalize", normalize, get_args(Normalize))
    if not 0 <= beta < 1:
        raise ValueError(f"beta: given {beta!r}, expected a number from 0 to below 1")
    original = n = _check_counts(counts)
    empty_classes = (n == 0).nonzero()[:, 0].tolist()
    if zero == "smooth":
        n = n + 1
    elif empty_classes and zero == "error":
        raise ValueError(
            f"counts: no examples of class {_shorten(empty_classes)}: pass zero='ignore' or zero='smooth'; "
            f"{_COUNTS_ONLY}"
        )
    present = n > 0
    if scheme == "balanced":
        weights = n.sum() / (present.sum() * n)
    elif scheme == "inverse":
        weights = 1 / n
    elif scheme == "inverse_sqrt":
        weights = n.rsqrt()
    else:
        weights = (1 - beta) / (1 - beta**n)
    weights = torch.where(present, weights, 0)
    if normalize == "classes":
        weights = weights * (original > 0).sum() / weights[original > 0].sum()
    elif normalize == "examples":
        weights = weights * original.sum() / (weights * original).sum()
    return weights.float()


_COUNTS_ONLY = (
    "class_weights takes counts, one for each class; for labels: class_weights(class_counts(labels, num_classes))"
)


def _is_one_hot(values: Tensor, dim: int) -> bool:
    """Whether integers are 0, and 1 once along `dim`."""
    values = values.long()  # the sum of uint8 values wraps around, and uint16 cannot be summed
    return bool(((values == 0) | (values == 1)).all() and (values.sum(dim) == 1).all())


def _check_counts(counts: Sequence[float] | Tensor) -> Tensor:
    """Returns the counts as float64 (K,) on the CPU."""
    values = as_tensor("counts", counts, "numbers")
    if values.dim() != 1 or values.dtype == torch.bool or values.is_complex():
        raise ValueError(
            f"counts: given {values.dtype} of shape {tuple(values.shape)}, expected integers or floats of shape (K,); "
            f"{_COUNTS_ONLY}"
        )
    # From the counts again, because torch reads floats of a sequence in its default dtype.
    values = as_tensor("counts", counts, "numbers", torch.float64).cpu()
    invalid = (~(values.isfinite() & (values >= 0))).nonzero()[:, 0].tolist()
    if invalid:
        shown = _shorten([f"{values[c].item():g} for class {c}" for c in invalid])
        raise ValueError(f"counts: given {shown}, expected finite numbers of at least 0; {_COUNTS_ONLY}")
    if not (values > 0).any():
        given = "all are 0" if len(values) else "empty"
        raise ValueError(f"counts: {given}; weights need at least one example")
    return values


def _shorten(items: Sequence[object], most: int = 5) -> str:
    """The first items, and how many there are if that is not all."""
    shown = ", ".join(map(str, items[:most]))
    return shown if len(items) <= most else f"{shown}, ... ({len(items)} in all)"


@overload
def prior_bias(pi: float) -> float: ...
@overload
def prior_bias(pi: Tensor) -> Tensor: ...
def prior_bias(pi: float | Tensor) -> float | Tensor:
    """The bias b with sigmoid(b) = pi, so that training starts at the class frequency and not at 1/2.

    Source: section 4.1 of the paper.

    Args:
        pi: above 0 and below 1; a number, or a tensor with one value per class.

    Returns: a float for a number; for a tensor, a tensor of its shape, dtype and device.

    Raises: ValueError for `pi` outside (0, 1).
    """
    values = torch.as_tensor(pi, dtype=torch.float64)
    if not ((values > 0) & (values < 1)).all():
        raise ValueError(f"pi: given {pi!r}, expected above 0 and below 1")
    bias = torch.logit(values)
    return bias.to(pi) if isinstance(pi, Tensor) else float(bias)
