"""What common mistakes in a focal loss do to its value and its gradient. Prints the table of docs/losses.md.

    python benchmarks/focal_variants.py

Each variant is written as it usually occurs, and compared with the right loss on the same seeded examples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_focal

from retina.losses import sigmoid_focal_loss, softmax_focal_loss

ALPHA, GAMMA = 0.25, 2.0
GENERATOR_SEED = 0


def binary_problem() -> tuple[Tensor, Tensor]:
    """10,000 logits, 2 % positive: negatives around -3, positives around 0."""
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    y = (torch.arange(10_000) < 200).double()
    return 1.5 * torch.randn(10_000, generator=generator, dtype=torch.float64) - 3 * (1 - y), y


def three_classes() -> tuple[Tensor, Tensor]:
    """10,000 rows of 3 logits, classes 90/9/1."""
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    ids = torch.tensor([0] * 9000 + [1] * 900 + [2] * 100)
    return torch.randn(10_000, 3, generator=generator, dtype=torch.float64) + 2 * F.one_hot(ids, 3), ids


def focus_from_mean_cross_entropy(x: Tensor, y: Tensor) -> Tensor:
    """One modulating factor for the whole batch."""
    mean = F.binary_cross_entropy_with_logits(x, y)
    return ALPHA * (1 - torch.exp(-mean)) ** GAMMA * mean


def elementwise(x: Tensor, y: Tensor, detach: bool = False, same_alpha: bool = False) -> Tensor:
    """Equation 5, with two possible mistakes."""
    p_t = torch.where(y == 1, x.sigmoid(), 1 - x.sigmoid())
    alpha_t = ALPHA if same_alpha else torch.where(y == 1, ALPHA, 1 - ALPHA)
    factor = (1 - (p_t.detach() if detach else p_t)) ** GAMMA
    return (alpha_t * factor * -p_t.log()).mean()


WEIGHT = torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64)


def softmax_mean_over_elements(x: Tensor, ids: Tensor) -> Tensor:
    """.mean() over (N, C)."""
    log_p = F.log_softmax(x, dim=1)
    return (F.one_hot(ids, 3) * (1 - log_p.exp()) ** GAMMA * -log_p).mean()


def softmax_weighted_sum_over_n(x: Tensor, ids: Tensor) -> Tensor:
    """The weighted sum divided by N."""
    return softmax_focal_loss(x, ids, gamma=GAMMA, class_weight=WEIGHT, reduction="none").mean()


def effect(wrong: Tensor, right: Tensor, x: Tensor, rare: Tensor) -> str:
    """Loss and gradient norm relative to the right ones, cosine between the gradients, share of the rare class."""
    g_wrong, g_right = (torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (wrong, right))
    cosine = F.cosine_similarity(g_wrong.flatten(), g_right.flatten(), dim=0).item()
    norm_ratio = (g_wrong.norm() / g_right.norm()).item()
    share = [100 * (g[rare].abs().sum() / g.abs().sum()).item() for g in (g_wrong, g_right)]
    return f"{wrong.item() / right.item():.3g} | {norm_ratio:.3g} | {cosine:.2f} | {share[0]:.0f} % ({share[1]:.0f} %)"


def first_logit(breaks: Callable[[Tensor], bool]) -> int:
    """The smallest integer logit at which `breaks` is true."""
    return next(x for x in range(1, 1000) if breaks(torch.tensor([float(x)], requires_grad=True)))


def nan_below_gamma_one(x: Tensor) -> bool:
    """torchvision's formula with gamma 0.5 for a positive at x."""
    loss = torchvision_focal(x, torch.ones(1), gamma=0.5, reduction="sum")
    return bool(torch.autograd.grad(loss, x)[0].isnan())


def infinite_log_of_softmax(x: Tensor) -> bool:
    """log(softmax(.)) of the wrong class, at x logits below the other."""
    return bool(F.softmax(torch.cat([x, torch.zeros(1)]), dim=0).log()[1].isinf())


def zero_in_float16(x: Tensor) -> bool:
    """Equation 5 in float16 for a negative at -x."""
    p = (-x.half()).sigmoid()
    return bool((1 - ALPHA) * p**GAMMA * -(1 - p).log() == 0)


def table() -> str:
    """The Markdown table."""
    x, y = binary_problem()
    x.requires_grad_()
    right = sigmoid_focal_loss(x, y, alpha=ALPHA, gamma=GAMMA)
    per_positive = sigmoid_focal_loss(x, y, alpha=ALPHA, gamma=GAMMA, avg_factor=y.sum())
    z, ids = three_classes()
    z.requires_grad_()
    softmax = softmax_focal_loss(z, ids, gamma=GAMMA)
    weighted = softmax_focal_loss(z, ids, gamma=GAMMA, class_weight=WEIGHT)
    rows = [
        ("alpha on both sides", effect(elementwise(x, y, same_alpha=True), right, x, y == 1)),
        ("alpha on the wrong side (0.25 for negatives)", effect(
            sigmoid_focal_loss(x, y, alpha=1 - ALPHA, gamma=GAMMA), right, x, y == 1)),
        ("p_t detached in the modulating factor", effect(elementwise(x, y, detach=True), right, x, y == 1)),
        ("focus from the averaged cross entropy", effect(focus_from_mean_cross_entropy(x, y), right, x, y == 1)),
        ("mean over all anchors, not over positives", effect(right, per_positive, x, y == 1)),
        ("softmax: mean over N x C", effect(softmax_mean_over_elements(z, ids), softmax, z, ids == 2)),
        ("softmax: weighted sum divided by N", effect(softmax_weighted_sum_over_n(z, ids), weighted, z, ids == 2)),
    ]  # fmt: skip
    header = [
        "| Mistake | loss, times the right one | gradient, times | cosine | positives (right) |",
        "|---|---|---|---|---|",
    ]
    breaks = [
        ("gamma 0.5 as (1 - p)^gamma", f"right | NaN from a logit of {first_logit(nan_below_gamma_one)}"),
        ("log(softmax), not log_softmax", f"infinite from a logit of {first_logit(infinite_log_of_softmax)} | NaN"),
        ("computed in float16", f"0 from a logit of -{first_logit(zero_in_float16)} | 0"),
    ]
    lines = [*rows, *((name, f"{effects} | | ") for name, effects in breaks)]
    return "\n".join([*header, *(f"| {name} | {numbers} |" for name, numbers in lines)])


if __name__ == "__main__":
    print(table())
