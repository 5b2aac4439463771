"""The blocks of the fused kernel: those of background have a branch of their own, in programs that are not cut off."""

from __future__ import annotations

import pytest
import torch
from triton_helpers import DEVICE, compare, fused, problem

from retina.losses import focal_triton, sigmoid_focal_loss

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", [0.0, 0.2, 1.0, 2.0, 2.3, 5.0])
def test_blocks_of_background(gamma: float, dtype: torch.dtype) -> None:
    """They have a branch of their own. The last block is shorter than the others."""
    for classes in (focal_triton.FEWEST_CLASSES, 80, 91):
        rows = focal_triton.ELEMENTS // classes + 3  # a whole program: in one that is cut off no block takes the branch
        assert focal_triton._rows_of_a_program(classes) and rows * classes % focal_triton._block(dtype)
        logits, _ = problem((rows, classes), dtype)
        with torch.no_grad():  # finite in float16 too
            logits.view(-1)[:16] = torch.tensor(
                [1e4, -1e4, 200, -200, 87, 88, 89, -86, -87, -88, 17, -17, 1, -1, 0, 1e-4]
            )
        compare(logits, torch.full((rows,), classes, device=DEVICE), gamma=gamma, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [focal_triton.FEWEST_CLASSES, 80, 91, 264])
@pytest.mark.parametrize("label", [-1, 0, -2], ids=["ignored", "first class", "last class"])
def test_one_other_row_at_either_end_of_a_block(label: int, classes: int, dtype: torch.dtype) -> None:
    """A block that contains a part of a row must see its class id, and no other."""
    block, end = focal_triton._block(dtype), focal_triton.ELEMENTS
    rows, label = 2 * end // classes + 2, classes - 1 if label == -2 else label
    places = (0, block - 1, block, 2 * block - 1, end - block, end - 1, end, 2 * end - 1, rows * classes - 1)
    for element in places if classes == 91 else places[1::4]:
        ids = torch.full((rows,), classes, device=DEVICE)
        ids[element // classes] = label
        compare(problem((rows, classes), dtype)[0], ids, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ignored_and_infinite_logits_beside_background(dtype: torch.dtype) -> None:
    logits, _ = problem((150, 80), dtype)
    ids = torch.full((150,), 80, device=DEVICE)
    with torch.no_grad():
        logits[12], ids[12] = torch.inf, -1  # in the first two blocks
        logits[40, :7] = -torch.inf  # certain of background: loss and gradient 0
    loss = fused(logits, ids, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all() and not gradient[12].any() and not gradient[40, :7].any()
    kept = torch.arange(150, device=DEVICE) != 12
    exact = logits.detach()[kept].clamp(min=-80).double()
    expected = sigmoid_focal_loss(exact, ids[kept], reduction="sum", impl="reference")
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    logits.data[59, 3] = torch.nan
    assert fused(logits, ids, reduction="sum").isnan()  # not hidden


def test_background_that_is_ignored() -> None:
    logits, ids = problem((150, 80))[0], torch.full((150,), 80, device=DEVICE)
    loss = fused(logits, ids, ignore_index=80, reduction="sum")
    assert loss.item() == 0 and not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("ignore_index", [2**32, 2**32 + 80, -(2**63)])
def test_an_ignore_index_of_64_bits(ignore_index: int) -> None:
    """Cut to 32 bits these are the first class, or background."""
    logits, ids = problem((150, 80))[0], torch.full((150,), 80, device=DEVICE)
    ids[5] = ids[120] = ignore_index
    compare(logits, ids, ignore_index=ignore_index, reduction="sum")


def test_more_than_one_program_and_block() -> None:
    rows = 2 * focal_triton.ELEMENTS // 80 + 7
    compare(*problem((1, rows, 80)), reduction="sum")
