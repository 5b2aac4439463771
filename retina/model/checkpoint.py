"""Checkpoint files: written so that a kill at any instant leaves a valid one, and verified when they are read.

A file is an ordinary `torch.save` of {"state": ..., "sha256": ..., "format": ...}. The digest covers every byte of
every tensor and every plain value, so two states are equal exactly if their digests are.

This file does not know what a state contains. train/state.py does: `TrainState.state_dict` and `checkpoint_metadata`
give the state that is saved, `TrainState.load_state_dict` reads it when a run resumes. `read_weights` in
model/weights.py reads it for evaluation and prediction.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retina.atomic_files import atomic_file, named_errors
from retina.model.weights_file import WeightsError, read_file

FORMAT = 1  # increase it when files of an earlier format can no longer be read
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"


class CheckpointError(ValueError):
    """A file that is not a valid checkpoint. The message names the file and the reason."""


class FormatError(CheckpointError):
    """A checkpoint of another version of the program."""


def digest(state: Any) -> str:
    """SHA-256 of nested dicts, lists, tensors and plain values, independent of the device and of the order of dicts.

    Raises TypeError for anything else: a checkpoint must load with weights_only=True.
    """
    sha = hashlib.sha256()
    _hash_value(sha, state, "state")
    return sha.hexdigest()


def save(path: Path, state: dict[str, Any], keep: Path | None = None) -> None:
    """Write `state` to `path`: temporary file in the same folder, fsync, rename, fsync of the folder.

    Args:
        path: the checkpoint file.
        state: nested dicts and lists of tensors and plain values.
        keep: the old file at `path` is renamed to this first; None replaces it.

    Raises:
        TypeError: the state contains anything else, see `digest`.
        OSError: for example a full disk; the old file is unchanged.
    """
    payload = {"state": state, "sha256": digest(state), "format": FORMAT}
    with atomic_file(path, keep) as temporary, temporary.open("wb") as file:
        try:
            torch.save(payload, file)  # to a path, torch would raise a RuntimeError without the reason
        except RuntimeError as error:  # torch's own error while it closes a file that could not be written
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load(path: Path) -> dict[str, Any]:
    """The state, on the CPU. Raises CheckpointError for a file that is truncated, altered or no checkpoint."""
    return verified_state(_read(path), path)


def verified_state(payload: Any, path: Path) -> dict[str, Any]:
    """The state in what `read_file` gave for a file by `save`. Raises CheckpointError, as `load` does."""
    if not is_payload(payload):
        raise CheckpointError(f"{path}: not a checkpoint of this project (no checksum inside)")
    if payload.get("format") != FORMAT:
        raise FormatError(f"{path}: checkpoint format {payload.get('format')}, this version reads {FORMAT}")
    state: dict[str, Any] = payload["state"]
    if digest(state) != payload["sha256"]:
        raise CheckpointError(f"{path}: checksum does not match: the file was altered or damaged")
    return state


def save_last(run: Path, state: dict[str, Any]) -> None:
    """Write `state` to last.pt of the run folder; the old last.pt becomes previous.pt. One of them is always valid."""
    save(run / LAST, state, keep=run / PREVIOUS)


def is_payload(content: Any) -> bool:
    """Whether `content`, read from a file, was written by `save`."""
    return isinstance(content, dict) and {"sha256", "state"} <= content.keys()


def load_newest(run: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The state of the newest valid file of last.pt and previous.pt, or None without both, and why one was refused.

    A damaged last.pt is renamed to last.pt.damaged, so that the next save does not move it over the valid file.

    Raises:
        CheckpointError: none of the files can be read. They stay where they are.
        FormatError: a file is of another version of the program.
        OSError: the disk fails. The file may be valid.
    """
    refused: list[str] = []
    for name in (LAST, PREVIOUS):
        if (run / name).exists():
            try:
                state = load(run / name)
            except FormatError:
                raise
            except CheckpointError as error:
                if isinstance(error.__cause__, OSError):
                    with named_errors(run / name):
                        raise error.__cause__ from None
                refused.append(str(error))
            else:
                if refused:
                    (run / LAST).replace(run / f"{LAST}.damaged")
                return state, refused
    if refused:
        reasons = "; ".join(refused)
        raise CheckpointError(f"{reasons}; to start anew, move what is damaged away or give another output_dir")
    return None, refused


def newest_state(run: Path) -> dict[str, Any] | None:
    """The state of the newest valid file of last.pt and previous.pt, or None. Unlike `load_newest` it only looks."""
    for name in (LAST, PREVIOUS):
        with contextlib.suppress(CheckpointError):
            return load(run / name)
    return None


def _read(path: Path) -> Any:
    try:
        return read_file(path)
    except WeightsError as error:
        raise CheckpointError(str(error)) from error.__cause__


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
