"""Compiles every kernel for a Hopper GPU, which needs no GPU. Prints registers, spills and instructions.

    python tests/losses/compile_kernels.py

Triton's interpreter accepts more than its compiler does, so test_focal_triton.py runs this script too.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from retina import assign_triton, detect_triton
from retina.losses import focal_triton, nms_triton

TYPES = {
    # of the focal loss
    "logits": "*{dtype}", "gradient": "*{dtype}", "targets": "*i16", "weights": "*fp32", "alphas_pos": "*fp32",
    "alphas_neg": "*fp32", "divisor": "*fp32", "partial_sums": "*fp32", "upstream": "*fp32", "total": "i32",
    "rows_per_image": "i32", "logit_stride_n": "i32", "logit_stride_r": "i32", "logit_stride_k": "i32",
    "gradient_stride_n": "i32", "gradient_stride_r": "i32", "gradient_stride_k": "i32", "alpha_pos": "fp32",
    "alpha_neg": "fp32", "gamma": "fp32", "remainder": "fp32", "scale": "fp32", "ignore_index": "i32", "blocks": "i32",
    # of the matching
    "anchors": "*fp32", "boxes": "*fp32", "ignores": "*fp32", "labels": "*i64", "images": "*i32", "best_BT": "*fp32",
    "best_T": "*fp32", "label_NR": "*i16", "box_NR4": "*fp32", "R": "i32", "T": "i32", "num_classes": "i32",
    "positive_iou": "fp32", "negative_iou": "fp32",
    # of NMS
    "boxes_NC4": "*fp32", "labels_NC": "*i64", "count_N": "*i32", "keep_NM": "*i64", "found_N": "*i32", "C": "i32",
    "max_detections": "i32", "max_iou": "fp32", "largest": "*{dtype}", "rows": "i32",
}  # fmt: skip


def build(kernel: Any, constants: dict[str, Any], dtype: str = "fp32", warps: int = 4, fusion: bool = True) -> Any:
    """The compiled kernel, with pointers that are aligned as PyTorch's are. KeyError for an unknown argument name."""
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        stored = "fp32" if dtype == "fp16" and name == "gradient" else dtype  # as in _empty_gradient
        signature[name] = "constexpr" if name in constants else TYPES[name].format(dtype=stored)
        if signature[name].startswith("*") or name == "total":
            aligned[(position,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": fusion}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def build_focal(constants: dict[str, Any], dtype: str) -> Any:
    """The compiled focal kernel, with the block size of the dtype."""
    block = focal_triton._block({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
    return build(
        focal_triton._focal_kernel,
        constants | {"BLOCK": block, "INTERPRETED": False},
        dtype,
        focal_triton._warps(block),
    )


def describe(name: str, built: Any, elements: int) -> str:
    """Registers and spills of a thread, and machine instructions for each of the elements that it handles.

    A kernel with a branch for blocks of background: also what a block in its loop needs, by either branch.
    """
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        usage, code = (
            subprocess.run([tools / "cuobjdump", flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", code, re.M)
    lines = [(int(address, 16), op, rest) for address, op, rest in found if op != "NOP"]
    line = (
        f"{name:44} registers {registers:3}, stack {stack}, instructions {len(lines):4}, "
        f"{len(lines) / elements:.1f} an element"
    )
    background, mixed = loop_lengths(lines, elements)
    return line + (f", in the loop {background / elements:.1f} or {mixed / elements:.1f}" if mixed else "")


def loop_lengths(lines: list[tuple[int, str, str]], elements: int) -> tuple[int, int]:
    """Instructions of a block in the loop, by the cheaper and by the dearer of its two branches; zeros without two.

    Only in the branches does each element have its own exp2. An unrolled loop has several blocks in a turn.
    """
    jumps = {
        address: int(match[1], 16)
        for address, op, rest in lines
        if op == "BRA" and (match := re.search(r"0x(\w+)", rest))
    }
    loops = [(target, address) for address, target in jumps.items() if target < address]
    if len(loops) != 1:
        return 0, 0
    runs: list[list[str]] = [[]]
    for address, op, _ in lines:
        if loops[0][0] <= address <= loops[0][1]:
            if address in jumps.values():
                runs.append([])
            runs[-1].append(op)
            if op == "BRA":
                runs.append([])
    branches = sorted(len(run) for run in runs if run.count("MUFU.EX2") >= elements)
    blocks, odd = divmod(len(branches), 2)
    if not blocks or odd:
        return 0, 0
    total = sum(map(len, runs))
    return (total - sum(branches[blocks:])) // blocks, (total - sum(branches[:blocks])) // blocks


def main() -> None:
    """One line for each kernel and specialization."""
    each = focal_triton.EACH
    common = {"CONTIGUOUS": True, "PER_CLASS": False, "WEIGHTED": False, "DIVIDED": True, "GRADIENT": True}
    common |= {"ELEMENTS": focal_triton.ELEMENTS, "ROWS": 0}
    gamma_2 = {"HALVES": 4, "HAS_REMAINDER": False}
    for dtype in ("fp32", "bf16", "fp16"):
        for classes, halves, has_remainder in (
            (80, 4, False),
            (91, 4, False),
            (264, 4, False),
            (80, 2, False),
            (80, 0, False),
            (80, 1, True),
            (1, 4, False),
        ):
            constants = common | {"K": classes, "HALVES": halves, "HAS_REMAINDER": has_remainder}
            constants["ROWS"] = focal_triton._rows_of_a_program(classes)
            built = build_focal(constants, dtype)
            suffix = " + remainder" if has_remainder else ""
            print(describe(f"focal {dtype} K {classes} gamma {halves / 2:g}{suffix}", built, each))
    full = common | gamma_2 | {"K": 80, "CONTIGUOUS": False, "PER_CLASS": True, "WEIGHTED": True}
    for dtype in ("fp32", "bf16"):
        print(describe(f"focal {dtype}, strided, weights, alphas", build_focal(full, dtype), each))
    no_gradient = common | gamma_2 | {"K": 80, "GRADIENT": False, "ROWS": focal_triton._rows_of_a_program(80)}
    print(describe("focal bf16, no gradient", build_focal(no_gradient, "bf16"), each))
    print(
        describe(
            "rescale bf16", build(focal_triton._rescale_kernel, {"BLOCK": focal_triton.RESCALE_BLOCK}, "bf16"), each
        )
    )
    block, warps = assign_triton.BLOCK, assign_triton.WARPS
    each = block // (32 * warps)
    for second, overwrite in ((False, False), (True, False), (True, True)):
        constants = {"LOW_QUALITY": second, "OVERWRITE": overwrite, "STORES_BEST": not second}
        constants |= {"PADDING_IS_IGNORED": overwrite, "BLOCK": block}
        built = build(assign_triton._match_kernel, constants, warps=warps, fusion=False)
        assert "fma.rn.f32" not in built.asm["ptx"], "a fused multiply-add would change ties"
        run = "second" if second else "first"
        print(describe(f"match, {run} run{', overwrite' if overwrite else ''}", built, each))
    block, warps = nms_triton.BLOCK, nms_triton.WARPS
    suppression = build(nms_triton._nms_kernel, {"DROPS_EMPTY": True, "BLOCK": block}, warps=warps, fusion=False)
    assert "fma.rn.f32" not in suppression.asm["ptx"], "a fused multiply-add would change IoUs"
    print(describe("NMS", suppression, block // (32 * warps)))
    maximum = build(detect_triton._max_kernel, {"K": 80, "COLUMNS": 128, "ROWS": 32}, "bf16")
    print(describe("maximum over classes, bf16, K 80", maximum, 32))


if __name__ == "__main__":
    main()
