"""Class weights and initial biases from the number of examples of each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from retina.losses.arguments import check_choice, check_count

Scheme = Literal["balanced", "inverse", "inverse_sqrt", "effective_number"]
Zero = Literal["error", "ignore", "smooth"]
Normalize = Literal["classes", "examples"]


def class_weights(
    labels_or_counts: Sequence[float] | Tensor,
    num_classes: int,
    *,
    scheme: Scheme = "balanced",
    beta: float = 0.999,
    zero: Zero = "error",
    normalize: Normalize | None = None,
) -> Tensor:
    """Returns a weight for each class, float32 (K,); rarer classes get larger weights.

    Args:
        labels_or_counts: class ids 0..K-1 of any shape (integers); or K counts: floats, or integers of which one is K
            or more. K integers that could be labels or counts raise an error: pass counts as floats.
        num_classes: K.
        scheme: with n_c examples of class c and n in total: "balanced" n / (K n_c), as compute_class_weight of
            scikit-learn; "inverse" 1 / n_c; "inverse_sqrt" 1 / sqrt(n_c); "effective_number"
            (1 - beta) / (1 - beta^n_c) (Cui et al., CVPR 2019, arXiv 1901.05555).
        beta: parameter of "effective_number", at least 0 and below 1; near 1 the weights approach "inverse".
        zero: how to treat a class without examples: "error" raises; "ignore" gives it weight 0 and does not count it
            in K; "smooth" adds 1 to the count of every class.
        normalize: None; "classes" scales the weights to an average of 1 over the classes that have examples;
            "examples" to an average of 1 over the examples, so that the learning rate need not change.

    Raises: ValueError for invalid arguments, with the classes and values concerned.
    """
    check_choice("scheme", scheme, get_args(Scheme))
    check_choice("zero", zero, get_args(Zero))
    if normalize is not None:
        check_choice("normalize", normalize, get_args(Normalize))
    if not 0 <= beta < 1:
        raise ValueError(f"beta: given {beta!r}, expected a number from 0 to below 1")
    original_counts = counts = _counts(torch.as_tensor(labels_or_counts), num_classes)
    empty_classes = (counts == 0).nonzero()[:, 0].tolist()
    if zero == "smooth":
        counts = counts + 1
    elif empty_classes and zero == "error":
        raise ValueError(
            f"no examples of class {', '.join(map(str, empty_classes))}: pass zero='ignore' or zero='smooth'"
        )
    present = counts > 0
    if scheme == "balanced":
        weights = counts.sum() / (present.sum() * counts)
    elif scheme == "inverse":
        weights = 1 / counts
    elif scheme == "inverse_sqrt":
        weights = counts.rsqrt()
    else:
        weights = (1 - beta) / (1 - beta**counts)
    weights = torch.where(present, weights, 0)
    if normalize == "classes":
        weights = weights * (original_counts > 0).sum() / weights[original_counts > 0].sum()
    elif normalize == "examples":
        weights = weights * original_counts.sum() / (weights * original_counts).sum()
    return weights.float()


def _counts(labels_or_counts: Tensor, num_classes: int) -> Tensor:
    check_count("num_classes", num_classes)
    values = labels_or_counts
    if not values.numel():
        raise ValueError("labels_or_counts: empty; weights need at least one example")
    if values.is_floating_point():
        if values.shape != (num_classes,) or not (values.isfinite() & (values >= 0)).all():
            raise ValueError(
                f"counts (floats): given shape {tuple(values.shape)}, expected {num_classes} finite "
                "numbers of at least 0; labels are integers"
            )
        counts = values.double()
    else:
        values = values.long()
        low, high = int(values.min()), int(values.max())
        one_per_class = values.shape == (num_classes,)
        if low < 0 or (high >= num_classes and not one_per_class):
            raise ValueError(
                f"labels: given {low}..{high}, expected 0..{num_classes - 1} (drop ignored ones first); "
                f"counts: expected {num_classes} values of at least 0"
            )
        if one_per_class and high < num_classes:
            raise ValueError(
                f"{values.tolist()} may be {num_classes} labels or {num_classes} counts: pass counts as floats, or "
                "labels as torch.bincount(labels, minlength=num_classes).float()"
            )
        counts = (values if one_per_class else torch.bincount(values.flatten(), minlength=num_classes)).double()
    if not counts.sum() > 0:
        raise ValueError("counts: all are 0; weights need at least one example")
    return counts.cpu()


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
