"""What the user reads when disk, memory or another process of the run fails: the reason, and how the run continues."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import distributed

from retina.config import Config
from retina.model import checkpoint
from retina.train.errors import RunError


@contextlib.contextmanager
def explained_failures(config: Config) -> Iterator[None]:
    """Raise RunError instead of an error of the run folder, the memory, or the connection to another process."""
    run = config.run_dir
    try:
        yield
    except OSError as error:
        if error.filename is None or not _is_in_or_above(file := Path(os.fsdecode(error.filename)), run):
            raise
        reason, advice = error.strerror, f"After the repair, --resume {_start(run)}."
        if isinstance(error, FileNotFoundError) and not run.exists():
            reason = "it was removed, or its disk is gone"
            advice = "If it comes back, --resume continues after its newest checkpoint; if not, it starts at step 0."
        raise RunError(f"run folder {run}: {reason} ({file.name})\n{advice}") from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise RunError(f"out of memory: {str(error).splitlines()[0]}\n{_less_memory(config)}") from error
        # Gloo has no error class of its own. The errors of NCCL and of the store are DistErrors.
        if not isinstance(error, distributed.DistError) and "/gloo/" not in str(error):
            raise
        reason = re.sub(r"^\[[^]]*\] ", "", str(error).splitlines()[0]).split(". This is typically")[0]
        raise RunError(
            f"process {os.environ['RANK']} of the run lost the connection to another one: {reason}\n"
            "That process or its machine ended, or the network failed. torchrun starts the processes again while it "
            "has restarts left (--max-restarts). After that, give the same command on every machine: with --resume, "
            f"the run {_start(run)}."
        ) from error


def _less_memory(config: Config) -> str:
    """What needs less memory, where the settings allow it."""
    train, advice = config.train, []
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if train.batch_size % (2 * train.accumulate * processes) == 0:
        advice += [f"In a step, --change train.accumulate={2 * train.accumulate} needs about half as much."]
    if train.eval_batch > 1:
        advice += ["In an evaluation, --change train.eval_batch=1 needs less."]
    advice += ["A run with a smaller train.batch_size or data.short_side is another one."]
    return " ".join([*advice, f"With --resume the run {_start(config.run_dir)}."])


def _start(run: Path) -> str:
    if state := checkpoint.newest_state(run):
        return f"continues after step {state['step']}"
    exists = any(os.path.lexists(run / name) for name in (checkpoint.LAST, checkpoint.PREVIOUS))
    return "continues after its newest checkpoint, if that can be read" if exists else "starts at step 0"


def _is_in_or_above(path: Path, run: Path) -> bool:
    return run == path or run in path.parents or path in run.parents
