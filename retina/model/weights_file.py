"""Reads files of weights, of this project and of others, without running code that a file may contain.

A pickle can name any function and have it called. So torch's files are read with `weights_only=True`, and the pickles
of detectron2's model zoo by an unpickler that knows the names in NUMPY only. Every other name in a file is an error,
except the few in INERT, in whose place an object is made that does nothing.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class WeightsError(ValueError):
    """A file that cannot be read as weights, or weights that do not fit the model. The message names what differs."""


_READ_ERRORS = (
    RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError,
    MemoryError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, struct.error,
)  # fmt: skip
_ZIP, _LEGACY_TORCH, _PICKLE = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80"


class _Inert:
    """Takes the place of an object of another library and keeps nothing of it."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _DType:
    """numpy.dtype as a pickle makes it: of a name, then of a state with the order of the bytes."""

    def __init__(self, name: str, *_: Any) -> None:
        if name not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
            raise pickle.UnpicklingError(f"an array of the type {name!r}, expected numbers")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(str(state[1]))  # type: ignore[arg-type]


class _Array:
    """numpy.ndarray as a pickle makes it: of nothing, then of a state with its shape, type and bytes."""

    def __init__(self, *_: Any) -> None:
        self.array: NDArray[Any] = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, content = state
        data = content.encode("latin1") if isinstance(content, str) else content  # text in pickles of Python 2
        array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if is_fortran else "C")
        self.array = array.astype(array.dtype.newbyteorder("="))


def _array_from_buffer(buffer: Any, dtype: _DType, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", bytes(buffer)))
    return array


def _encode(text: str, _: str) -> bytes:
    return text.encode("latin1")


# What NumPy's arrays name in a pickle, and what is called instead: NumPy's own functions would take any state, also one
# that breaks them. numpy.core became numpy._core in version 2.
NUMPY: dict[str, Any] = {
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray._reconstruct": _Array,
    "numpy.core.numeric._frombuffer": _array_from_buffer,
    "numpy._core.numeric._frombuffer": _array_from_buffer,
    "numpy.ndarray": _Inert,  # the type that _reconstruct is given
    "numpy.dtype": _DType,
    "_codecs.encode": _encode,
    "collections.OrderedDict": OrderedDict,
}
# Beside the weights, mmdetection stores the history of its losses, torchvision the arguments of its command.
INERT: dict[str, Any] = {
    "mmengine.logging.history_buffer.HistoryBuffer": _Inert,
    "argparse.Namespace": _Inert,
    "builtins.getattr": _Inert,
}


def read_file(path: Path) -> Any:
    """The content of a file by torch.save, a pickle of NumPy arrays, or a safetensors file; tensors are on the CPU.

    A safetensors file gives {"state_dict": its tensors, "meta": its metadata}.

    Raises:
        WeightsError: it is none of these, is damaged, or contains objects that could run code.
    """
    try:
        with path.open("rb") as file:
            start = file.read(16)
        if start.startswith((_ZIP, _LEGACY_TORCH)):
            return _read_torch(path)
        if start.startswith(_PICKLE):
            with path.open("rb") as file:
                return _NumpyUnpickler(file, encoding="latin1").load()
        if start[8:9] == b"{":  # after the length of the header
            return _read_safetensors(path)
    except _READ_ERRORS as error:
        if isinstance(error, WeightsError):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        if blocked is not None:
            reason = _blocked(blocked[1])
        raise WeightsError(f"{path}: not readable as weights: {reason}") from error  # the cause tells a failing disk
    raise WeightsError(f"{path}: not readable as weights: neither a file of torch.save, nor a pickle, nor safetensors")


def tensors_of(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what `read_file` gave: the whole of it, or its "model" (detectron2) or "state_dict".

    Raises WeightsError if there are no tensors.
    """
    state = content
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            state = content[key]
            break
    if not isinstance(state, dict) or not state:
        raise WeightsError(f"{path}: expected a state dict of tensors, given {type(state).__name__}")
    tensors = {}
    for key, value in state.items():
        if isinstance(value, _Array):
            value = torch.from_numpy(value.array)
        if not isinstance(value, Tensor):
            keys = ", ".join(map(str, list(state)[:5]))
            raise WeightsError(f"{path}: expected a state dict of tensors; it has the keys {keys}")
        tensors[str(key)] = value
    return tensors


class _NumpyUnpickler(pickle.Unpickler):
    """Knows the names in NUMPY and no others."""

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in NUMPY:
            raise pickle.UnpicklingError(_blocked(full_name))
        return NUMPY[full_name]


def _blocked(name: str) -> str:
    return (
        f"contains {name}, which could run code, so the file is not read. Save its weights alone: "
        "torch.save(model.state_dict(), FILE)"
    )


def _read_torch(path: Path) -> Any:
    with torch.serialization.safe_globals([(value, name) for name, value in (NUMPY | INERT).items()]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise WeightsError(f"{path}: safetensors files need the package: pip install safetensors") from None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
            return {"state_dict": tensors, "meta": file.metadata() or {}}
    except SafetensorError as error:
        raise WeightsError(f"{path}: not readable as weights: safetensors: {error}") from None
