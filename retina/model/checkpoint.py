"""Checkpoints: tensors and plain values only, written so that a kill at any instant leaves a whole one behind.

A file is an ordinary `torch.save` of {"state": ..., "sha256": ...}; the digest covers every byte of every tensor and
every plain value, so two states are equal exactly if their digests are.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retina.atomic_files import atomic_file

FORMAT = 1
_LOAD_ERRORS = (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError)  # what torch.load may raise
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"


class CheckpointError(ValueError):
    """A file that is no valid checkpoint; the message names it and says what is wrong."""


def digest(state: Any) -> str:
    """SHA-256 over a nest of dicts, lists, tensors and plain values, independent of device and of dict order.

    Raises TypeError for anything else: a checkpoint must load with weights_only=True.
    """
    sha = hashlib.sha256()
    _hash_value(sha, state, "state")
    return sha.hexdigest()


def save(path: Path, state: dict[str, Any], keep: Path | None = None) -> None:
    """Write `state` to `path`: temporary file in the same folder, fsync, rename, fsync of the folder.

    What was at `path` moves to `keep` first, where given. OSError (a full disk) leaves the old file as it was.
    """
    payload = {"state": state, "sha256": digest(state), "format": FORMAT}
    with atomic_file(path, keep) as temporary:
        torch.save(payload, temporary)


def load(path: Path) -> dict[str, Any]:
    """The state, on the CPU; CheckpointError for a truncated, altered or foreign file."""
    payload = _torch_load(path)
    if not isinstance(payload, dict) or "sha256" not in payload or "state" not in payload:
        raise CheckpointError(f"{path}: not a checkpoint of this project (no checksum inside)")
    if payload.get("format") != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {payload.get('format')}, this version reads {FORMAT}")
    state: dict[str, Any] = payload["state"]
    if digest(state) != payload["sha256"]:
        raise CheckpointError(f"{path}: checksum does not match: the file was altered or damaged")
    return state


def save_last(run: Path, state: dict[str, Any]) -> None:
    """`state` becomes last.pt, and what was last.pt previous.pt; at every instant one of the two is whole."""
    save(run / LAST, state, keep=run / PREVIOUS)


def is_checkpoint(path: Path) -> bool:
    """Whether the file is one of ours, damaged or not, rather than weights of another framework."""
    payload = _torch_load(path)
    return isinstance(payload, dict) and "sha256" in payload


def load_newest(run: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest valid of last.pt and previous.pt, or None, and a sentence for each file that was refused.

    A refused file is renamed to *.damaged, so that the next save does not move it over a good one.
    """
    refused: list[str] = []
    for name in (LAST, PREVIOUS):
        if (run / name).exists():
            try:
                return load(run / name), refused
            except CheckpointError as error:
                refused.append(str(error))
                (run / name).replace(run / f"{name}.damaged")
    return None, refused


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (*_LOAD_ERRORS, OSError, pickle.UnpicklingError, zipfile.BadZipFile, struct.error) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: not readable as a checkpoint: {reason}") from None


def _hash_value(sha: Any, value: Any, where: str) -> None:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        sha.update(f"tensor {tensor.dtype} {tuple(tensor.shape)};".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, dict):
        sha.update(f"dict {len(value)};".encode())
        for key in sorted(value, key=lambda key: (str(type(key)), key)):
            sha.update(f"{key!r}:".encode())
            _hash_value(sha, value[key], f"{where}.{key}")
    elif isinstance(value, list | tuple):
        sha.update(f"list {len(value)};".encode())
        for i, entry in enumerate(value):
            _hash_value(sha, entry, f"{where}[{i}]")
    elif value is None or isinstance(value, bool | int | float | str):
        sha.update(f"{json.dumps(value)};".encode())
    else:
        raise TypeError(f"{where}: {type(value).__name__} cannot be in a checkpoint: tensors and plain values only")
