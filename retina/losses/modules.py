"""The losses as modules. The settings are arguments of the constructor; values per class are buffers.

So `.to(device)` and `state_dict` include the class weights, and `print(module)` shows every setting. The function of
the same name documents each argument and the errors.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any, Self, get_args

import torch
from torch import Tensor, nn

from retina.losses.arguments import Reduction, as_tensor, check_choice
from retina.losses.focal import Impl, focal_star_loss, sigmoid_focal_loss
from retina.losses.mining import ohem_loss
from retina.losses.softmax import focal_nll_loss, softmax_focal_loss


class _Loss(nn.Module):
    """Stores the settings; each subclass declares them and calls its function."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self._names: list[str] = []
        for name, value in settings.items():
            self.register_setting(name, value)

    def register_setting(self, name: str, value: Any) -> None:
        """An argument of the function that is an attribute; it may be assigned later."""
        self._names.append(name)
        setattr(self, name, value)

    def register_per_class(self, name: str, values: float | Sequence[float] | Tensor | None) -> int:
        """Registers values per class as a buffer, a number or None as a setting.

        The buffer is float64, as the function reads a sequence: in float32, 1 - alpha near 1 would lose its digits.

        Returns the number of classes, 1 for a number or None.
        """
        if values is None or isinstance(values, numbers.Real):
            self.register_setting(name, values)
            return 1
        tensor = as_tensor(name, values, "numbers, or one number", torch.float64).clone()
        if tensor.requires_grad:
            raise ValueError(f"{name}: given a tensor with a gradient, which a module keeps constant; use the function")
        if not tensor.numel():
            raise ValueError(f"{name}: given no values, expected one number or one per class")
        self.register_buffer(name, tensor)
        return tensor.shape[0] if tensor.dim() else 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Values move to a device, but stay float64 in `.half()`, where 1 - 0.9995 would be 0, and in `.float()`."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, values in before.items():
            moved: Tensor = getattr(self, name)
            if moved.dtype != values.dtype:
                setattr(self, name, values.to(moved.device))
        return self

    def arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names} | dict(self.named_buffers())

    def extra_repr(self) -> str:
        shown = self.arguments() | {name: tuple(buffer.shape) for name, buffer in self.named_buffers()}
        return ", ".join(f"{name}={value!r}" for name, value in sorted(shown.items()))


class SigmoidFocalLoss(_Loss):
    """`sigmoid_focal_loss(logits, targets)`."""

    def __init__(
        self,
        alpha: float | Sequence[float] | Tensor | None = 0.25,
        gamma: float = 2.0,
        reduction: Reduction = "mean",
        ignore_index: int = -1,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(gamma=gamma, reduction=reduction, ignore_index=ignore_index)
        empty = torch.zeros(0, self.register_per_class("alpha", alpha))
        self(empty, empty)  # raises for invalid settings
        check_choice("impl", impl, get_args(Impl))
        self.register_setting("impl", impl)

    def forward(
        self, logits: Tensor, targets: Tensor, weight: Tensor | None = None, avg_factor: float | Tensor | None = None
    ) -> Tensor:
        return sigmoid_focal_loss(logits, targets, weight=weight, avg_factor=avg_factor, **self.arguments())


class FocalStarLoss(_Loss):
    """`focal_star_loss(logits, targets)`."""

    def __init__(
        self,
        gamma: float = 2.0,
        beta: float = 1.0,
        alpha: float | Sequence[float] | Tensor | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = -1,
    ) -> None:
        super().__init__(gamma=gamma, beta=beta, reduction=reduction, ignore_index=ignore_index)
        empty = torch.zeros(0, self.register_per_class("alpha", alpha))
        self(empty, empty)

    def forward(
        self, logits: Tensor, targets: Tensor, weight: Tensor | None = None, avg_factor: float | Tensor | None = None
    ) -> Tensor:
        return focal_star_loss(logits, targets, weight=weight, avg_factor=avg_factor, **self.arguments())


class SoftmaxFocalLoss(_Loss):
    """`softmax_focal_loss(logits, targets)`, in place of `nn.CrossEntropyLoss(weight)`."""

    def __init__(
        self,
        gamma: float = 2.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(gamma=gamma, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)
        self(torch.zeros(0, self.register_per_class("class_weight", class_weight)), torch.zeros(0, dtype=torch.long))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return softmax_focal_loss(logits, targets, **self.arguments())


class FocalNLLLoss(_Loss):
    """`focal_nll_loss(log_probs, targets)`, in place of `nn.NLLLoss(weight)` after a LogSoftmax."""

    def __init__(
        self,
        gamma: float = 2.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(gamma=gamma, ignore_index=ignore_index, reduction=reduction)
        self(torch.zeros(0, self.register_per_class("class_weight", class_weight)), torch.zeros(0, dtype=torch.long))

    def forward(self, log_probs: Tensor, targets: Tensor) -> Tensor:
        return focal_nll_loss(log_probs, targets, **self.arguments())


class OHEMLoss(_Loss):
    """`ohem_loss(logits, targets, anchors)`."""

    def __init__(
        self,
        batch_size: int = 128,
        nms_iou: float = 0.5,
        negatives_per_positive: int | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = -1,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            nms_iou=nms_iou,
            negatives_per_positive=negatives_per_positive,
            reduction=reduction,
            ignore_index=ignore_index,
        )
        self(torch.zeros(1, 0, 1), torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, 4))

    def forward(
        self,
        logits_NRK: Tensor,
        targets_NR: Tensor,
        anchors_R4: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor:
        return ohem_loss(logits_NRK, targets_NR, anchors_R4, weight=weight, avg_factor=avg_factor, **self.arguments())
