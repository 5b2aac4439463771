"""From the counts of classes to weights and biases."""

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
    """A weight for each class, larger for rarer ones; float32 (K,).

    Args:
        labels_or_counts: class ids 0..K-1 of any shape (integers); or K counts: floats, or integers of which one is K
            or more. K integers that could be either are refused: make counts floats.
        num_classes: K.
        scheme: with n_c examples of class c and n in all: "balanced" n / (K n_c), as scikit-learn's
            compute_class_weight; "inverse" 1 / n_c; "inverse_sqrt" 1 / sqrt(n_c); "effective_number"
            (1 - beta) / (1 - beta^n_c) (Cui et al., CVPR 2019, arXiv 1901.05555).
        beta: of "effective_number", 0 to below 1; towards 1 it approaches "inverse".
        zero: a class without examples: "error" raises; "ignore" gives it weight 0 and leaves it out of K; "smooth"
            counts every class once more.
        normalize: None; "classes" scales the weights to an average of 1 over the classes that have examples;
            "examples" to an average of 1 over the examples, so that a learning rate keeps its meaning.

    Raises: ValueError for what does not fit, naming classes and values.
    """
    check_choice("scheme", scheme, get_args(Scheme))
    check_choice("zero", zero, get_args(Zero))
    if normalize is not None:
        check_choice("normalize", normalize, get_args(Normalize))
    if not 0 <= beta < 1:
        raise ValueError(f"beta: given {beta!r}, expected a number from 0 to below 1")
    given = counts = _counts(torch.as_tensor(labels_or_counts), num_classes)
    empty = (counts == 0).nonzero()[:, 0].tolist()
    if zero == "smooth":
        counts = counts + 1
    elif empty and zero == "error":
        raise ValueError(
            f"no examples of class {', '.join(map(str, empty))}: zero='ignore' or 'smooth' decides for them"
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
        weights = weights * (given > 0).sum() / weights[given > 0].sum()
    elif normalize == "examples":
        weights = weights * given.sum() / (weights * given).sum()
    return weights.float()


def _counts(given: Tensor, num_classes: int) -> Tensor:
    check_count("num_classes", num_classes)
    if not given.numel():
        raise ValueError("labels_or_counts: empty; weights need at least one example")
    if given.is_floating_point():
        if given.shape != (num_classes,) or not (given.isfinite() & (given >= 0)).all():
            raise ValueError(
                f"counts (floats): given shape {tuple(given.shape)}, expected {num_classes} finite "
                "numbers of at least 0; labels are integers"
            )
        counts = given.double()
    else:
        given = given.long()
        low, high = int(given.min()), int(given.max())
        one_each = given.shape == (num_classes,)
        if low < 0 or (high >= num_classes and not one_each):
            raise ValueError(
                f"labels: given {low}..{high}, expected 0..{num_classes - 1} (drop ignored ones first); "
                f"counts: expected {num_classes} values of at least 0"
            )
        if one_each and high < num_classes:
            raise ValueError(
                f"{given.tolist()} may be {num_classes} labels or {num_classes} counts: pass counts as floats, or "
                "labels as torch.bincount(labels, minlength=num_classes).float()"
            )
        counts = (given if one_each else torch.bincount(given.flatten(), minlength=num_classes)).double()
    if not counts.sum() > 0:
        raise ValueError("counts: all are 0; weights need at least one example")
    return counts.cpu()


@overload
def prior_bias(pi: float) -> float: ...
@overload
def prior_bias(pi: Tensor) -> Tensor: ...
def prior_bias(pi: float | Tensor) -> float | Tensor:
    """The bias b with sigmoid(b) = pi, so that training starts at the classes' frequency and not at 1/2.

    `pi`: above 0 and below 1, a number or a tensor (one value a class). Source: paper, section 4.1. ValueError.
    """
    values = torch.as_tensor(pi, dtype=torch.float64)
    if not ((values > 0) & (values < 1)).all():
        raise ValueError(f"pi: given {pi!r}, expected above 0 and below 1")
    bias = torch.logit(values)
    return bias.to(pi) if isinstance(pi, Tensor) else float(bias)
