"""The fused kernel compared with the reference in float64: on a GPU, or in Triton's interpreter without one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from triton_helpers import CUDA, DEVICE, STEP, compare, fused, problem

from retina.losses import SigmoidFocalLoss, focal_triton, sigmoid_focal_loss

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 2.3, 5.0])
def test_every_gamma_and_dtype(gamma: float, dtype: torch.dtype) -> None:
    logits, ids = problem((3, 41, 11), dtype)
    compare(
        logits, ids, gamma=gamma, weight=torch.rand(3, 41, device=DEVICE), avg_factor=torch.tensor(7.0, device=DEVICE)
    )


@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 1), (1000, 3), (2, 77, 80), (3, 29, 91), (1, 33, 264), (2, 3, 4, 5)], ids=str
)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    compare(*problem(shape), reduction="sum")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_class_ids_of_every_dtype(dtype: torch.dtype) -> None:
    logits, ids = problem((50, 7))
    ids = ids.clamp(min=0) if dtype == torch.uint8 else ids
    expected = sigmoid_focal_loss(logits, ids, impl="reference")
    torch.testing.assert_close(fused(logits, ids.to(dtype)), expected)


def test_alpha_of_each_class_and_none() -> None:
    logits, ids = problem((60, 5))
    for alpha in (None, 0.7, [0.1, 0.3, 0.5, 0.7, 0.9]):
        compare(logits, ids, alpha=alpha, reduction="sum")


def test_empty_or_all_ignored() -> None:
    for shape, label in (((0, 4), 0), ((2, 0, 4), 0), ((3, 4), -1)):
        logits = torch.randn(shape, device=DEVICE, requires_grad=True)
        loss = fused(logits, torch.full(shape[:-1], label, device=DEVICE), avg_factor=1)
        loss.backward()
        assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8, 2.0])
def test_extreme_logits(gamma: float) -> None:
    values = [10000.0, -10000.0, 200.0, -200.0, 88.0, -88.0, 17.0, -17.0, 0.0, 1e-4]
    logits = torch.tensor(values, device=DEVICE)[:, None].repeat(1, 2).requires_grad_()
    for label in (0, 1, 2):
        compare(logits, torch.full((10,), label, device=DEVICE), gamma=gamma, reduction="sum")
    ignored = torch.tensor([[torch.inf, -torch.inf], [torch.nan, 0.0]], device=DEVICE, requires_grad=True)
    loss = fused(ignored, torch.tensor([-1, -1], device=DEVICE), gamma=gamma, reduction="sum")
    assert loss.item() == 0 and not torch.autograd.grad(loss, ignored)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_upstream_gradients(dtype: torch.dtype) -> None:
    logits, ids = problem((40, 6), dtype)
    for upstream in (0.0, -2.5, 1024.0 if dtype == torch.float16 else 1e-3):
        compare(logits, ids, upstream=upstream)
    values = torch.rand(3, device=DEVICE)  # the loss as a factor of a non-scalar result
    (gradient,) = torch.autograd.grad((fused(logits, ids) * values).sum(), logits)
    exact = logits.detach().double().requires_grad_()
    (slope,) = torch.autograd.grad(sigmoid_focal_loss(exact, ids, impl="reference") * values.sum(), exact)
    smallest = 6e-8 if dtype == torch.float16 else 1e-37
    torch.testing.assert_close(gradient.double(), slope, rtol=2 * STEP[dtype], atol=smallest)


def test_logits_with_any_strides() -> None:
    """Channels-last logits of a feature level, as in the detector; a part of a larger tensor; a transposed tensor."""
    nchw = torch.randn(2, 9 * 5, 6, 7, device=DEVICE).contiguous(memory_format=torch.channels_last)
    level = nchw.permute(0, 2, 3, 1).reshape(2, -1, 5)
    assert level.data_ptr() == nchw.data_ptr() and level.is_contiguous()
    larger = torch.randn(2, 100, 8, device=DEVICE)
    for logits in (level, larger[:, 10:60, 1:6], larger.transpose(0, 1), larger[:, ::2], larger[:1].expand(3, -1, -1)):
        x = logits.detach().requires_grad_()
        compare(x, torch.randint(-1, x.shape[-1] + 1, x.shape[:2], device=DEVICE), reduction="sum")


def test_every_element_of_the_gradient_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    empty_like = torch.empty_like
    filled_with_nan = lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(torch.nan)  # noqa: E731
    monkeypatch.setattr("retina.losses.focal_triton.torch.empty_like", filled_with_nan)
    for shape in ((7, 3), (2, 50, 91)):
        logits, ids = problem(shape)
        (gradient,) = torch.autograd.grad(fused(logits, ids), logits)
        assert gradient.isfinite().all()


def test_same_bits_every_run() -> None:
    logits, ids = problem((2, 400, 33), torch.bfloat16)
    runs = []
    for _ in range(3):
        loss = fused(logits, ids)
        runs.append((loss.detach(), torch.autograd.grad(loss, logits)[0]))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_gradient_allows_one_backward() -> None:
    logits, ids = problem((4, 3))
    loss = fused(logits, ids)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward use impl='reference'"):
        loss.backward()
    with pytest.raises(RuntimeError, match=r"second derivative .* use impl='reference'"):
        torch.autograd.grad(fused(logits, ids), logits, create_graph=True)


def test_no_gradient_is_computed_without_grad_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ids = problem((4, 3))
    expected = fused(logits, ids).item()
    monkeypatch.setattr("retina.losses.focal_triton.torch.empty_like", lambda *_, **__: pytest.fail("gradient made"))
    with torch.no_grad():
        assert fused(logits, ids).item() == expected


def test_compiles_without_a_graph_break() -> None:
    torch.compiler.reset()
    logits, ids = problem((30, 7))
    module = SigmoidFocalLoss(alpha=[0.3] * 7, gamma=1.5, impl="triton").to(DEVICE)
    compiled = torch.compile(lambda x: 2 * module(x, ids, avg_factor=3.0), fullgraph=True)
    loss = compiled(logits)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = 2 * module(logits, ids, avg_factor=3.0)
    torch.testing.assert_close((loss, gradient), (expected, torch.autograd.grad(expected, logits)[0]))


def test_vectors_with_any_strides() -> None:
    """Expanded weights (one image of a detector), a column of class ids, one alpha for all classes."""
    logits, ids = problem((1, 50, 7))
    two = torch.randint(0, 8, (50, 2), device=DEVICE)
    compare(logits, ids, weight=torch.tensor(2.0, device=DEVICE).expand(1, 50))
    compare(logits, ids, weight=torch.rand(1, 1, device=DEVICE).expand(1, 50))
    compare(logits[0].detach().requires_grad_(), two[:, 0])
    compare(logits, ids, alpha=torch.tensor(0.4, device=DEVICE))
    compare(logits, ids, alpha=torch.rand(7, 2, device=DEVICE)[:, 0])
    compare(logits, ids, avg_factor=torch.tensor(3.0))  # on the CPU


def test_rescale_of_more_blocks_than_programs() -> None:
    gradient = torch.rand(1024 * focal_triton.RESCALE_BLOCK + 777, device=DEVICE)
    expected = gradient * -2.5
    focal_triton._rescale(gradient, torch.tensor(-2.5, device=DEVICE))
    torch.testing.assert_close(gradient, expected)


def test_backward_allocates_no_tensor() -> None:
    logits, ids = problem((2, 30, 7))
    arguments = (logits, ids.reshape(-1), None, None, None, 0.25, 0.75, 2.0, -1, None, 1.0, True)
    loss, gradient = focal_triton._launch_forward(*arguments)
    assert loss.requires_grad and not gradient.requires_grad
    with profile(activities=[ProfilerActivity.CPU]) as events:
        (given,) = torch.autograd.grad(loss, logits)
    assert "aten::zeros" not in {event.key for event in events.key_averages()}  # of the logits' size, by autograd
    assert given.data_ptr() == gradient.data_ptr() and not given.requires_grad


def test_operators_have_schemas_and_fakes() -> None:
    logits, ids = problem((6, 5))
    flat = logits.detach().reshape(1, 6, 5)
    arguments = (flat, ids, None, None, None, 0.25, 0.75, 2.0, -1, None, 1.0, True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(focal_triton._launch_forward, arguments, test_utils=checks)
    upstream = torch.tensor(2.0, device=DEVICE)
    torch.library.opcheck(focal_triton._rescale, (torch.rand(8, device=DEVICE), upstream), test_utils=checks)


def test_kernels_compile_for_a_gpu() -> None:
    """For a Hopper GPU, on any machine: no spills, and no fused multiply-add in the matching.

    How registers are allocated depends on the version of Triton, so spills fail the test only with the version named
    here. With another one they give a warning.
    """
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 10 and all("stack" in line for line in lines)
    spilled = "\n".join(line for line in lines if "stack 0," not in line)
    if not focal_triton.triton.__version__.startswith("3.9."):
        if spilled:
            warnings.warn(f"spills with Triton {focal_triton.triton.__version__}:\n{spilled}", stacklevel=1)
        return
    assert not spilled, spilled
    pairs = [tuple(map(float, pair)) for pair in re.findall(r"in the loop (\S+) or (\S+)", done.stdout)]
    assert len(pairs) >= 15 and all(background < 0.9 * mixed for background, mixed in pairs), done.stdout


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_no_host_synchronization_and_a_cuda_graph() -> None:
    logits, ids = problem((2, 500, 80), torch.bfloat16)
    logits.requires_grad_(False)
    factor = torch.tensor(30.0, device=DEVICE)

    def step() -> tuple[Tensor, Tensor]:
        # A new leaf in each call: autograd remembers the stream on which a leaf was first used, and waits for it.
        leaf = logits.detach().requires_grad_()
        loss = sigmoid_focal_loss(leaf, ids, avg_factor=factor)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a capture needs a warm-up on a stream other than the default one
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    logits.copy_(torch.randn_like(logits))  # new values where the graph reads them
    factor.fill_(7.0)
    graph.replay()
    torch.testing.assert_close(captured, step(), rtol=0, atol=0)
