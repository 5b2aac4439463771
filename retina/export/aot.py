"""The file as an AOTInductor package: machine code for the processors of this kind, made by torch.export and Inductor.

It needs torch where it runs, in Python or C++, and torchvision for its NMS. It needs no other file: the metadata are
inside, too.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from retina.export.exported import ExportError
from retina.export.program import DetectionProgram, InputShape


def check_compiler() -> None:
    """Raise ExportError if there is no C++ compiler, before minutes are spent on the rest."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ExportError("--format torch needs a C++ compiler: install g++, or name another as CXX=clang++") from None


def write_package(program: DetectionProgram, shape: InputShape, metadata: dict[str, str], path: Path) -> None:
    """Compile the program, which takes a minute, or several for any size, and write it. The name must end in .pt2."""
    from torch._inductor import aoti_compile_and_package

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torchvision's own code
        exported = torch.export.export(program, (shape.example(),), dynamic_shapes=shape.dynamic_shapes())
        # Freezing packs the weights as the kernels of oneDNN take them, once, here.
        aoti_compile_and_package(
            exported, package_path=str(path), inductor_configs={"freezing": True, "aot_inductor.metadata": metadata}
        )
