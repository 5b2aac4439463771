"""The training loop: set up the data, the state and the log, then repeat `train_step`.

A step depends only on (seed, step) and on the state after the step before it. So a run that is killed at any instant
and resumed ends with the same bits as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection, Iterator
from typing import Any

import torch

from retina.analysis.results_file import results_columns
from retina.analysis.scoring import confirm, score
from retina.check import quick_check
from retina.config import Config
from retina.config_file import KEYS_OF_PLACE, config_from_yaml
from retina.data.coco import CocoDataset
from retina.data.loader import train_batches
from retina.data.sampling import describe_sampling
from retina.evaluate.coco import inference_on_dataset
from retina.model import checkpoint
from retina.train.distributed import broadcast, data_parallel, process_group
from retina.train.errors import NotFiniteError, RunError
from retina.train.failures import explained_failures
from retina.train.logbook import Logbook, check_run_folder
from retina.train.schedule import learning_rate, update_ema
from retina.train.start import create_train_state
from retina.train.state import TrainState, checkpoint_metadata
from retina.train.step import train_step
from retina.train.step_flags import StepFlags

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # Ctrl-C, a closed terminal, Slurm
REPEAT_SECONDS = 5.0
STOPPING = b"stopping after this step or evaluation; the same signal after 5 seconds ends the run at once\n"


def train(config: Config, resume: bool = False, changed_keys: Collection[str] = ()) -> dict[str, Any]:
    """Train in `config.run_dir`, and return the last entry of eval.json.

    Under torchrun every process calls it. STOP_SIGNALS write a checkpoint and end cleanly. `resume` continues
    from the newest valid checkpoint of the folder, if there is one. Then `changed_keys`, of KEYS_TO_CHANGE, may have
    other values than before, which hold from the next step on.
    Raises RunError, DataError, and what `load_pretrained` raises. Each message explains what to do.
    """
    check_run_folder(config, resume, changed_keys)  # before the processes join, so that none sees new files of another
    with (
        explained_failures(config),
        process_group() as (rank, world, device),
        Logbook(config, rank) as log,
        _catch_stop_signals(rank) as signals,
        _deterministic_cudnn(),
    ):
        _check_batch_size(config, world)
        train_set, val_set = load_datasets(config, log)
        state = create_train_state(config, train_set, val_set, device, resume, log)
        model = data_parallel(state.model)
        log.open(state.step, state.evaluated_step, state.changes)
        _catch_up(state, train_set, val_set, config, device, log)
        if state.has_ended(config.train):
            log.info(f"nothing left to do: the run ended after step {state.step}")
            return _end(log)
        flags = StepFlags(device)
        for batches in train_batches(train_set, config, state.step, rank, world):
            batches = [batch.to(device) for batch in batches]
            log_is_due, evaluation_is_due, checkpoint_is_due = (
                _is_due(state.step + 1, every, config)
                for every in (config.train.log_every, config.train.eval_every, config.train.checkpoint_every)
            )
            losses = train_step(
                model,
                state.optimizer,
                batches,
                train_set.num_classes,
                state.ema_positives,
                config,
                state.step,
                stop=bool(signals),
                log_loss_parts=log_is_due,
            )
            if state.ema_model:
                update_ema(state.ema_model, state.model, config.train.ema, state.step)
            state.step += 1
            try:
                stopping = flags.read()  # of the step before, while the device computes this one
                flags.send(state.step, losses, batches)
                if stopping or log_is_due or evaluation_is_due or checkpoint_is_due:
                    stopping |= flags.read()
            except NotFiniteError as error:
                path = log.save_nonfinite_batch(error.step, error.image_ids)
                raise RunError(f"{error}; the image ids are in {path}") from None
            log.log_step(state.step, losses, learning_rate(state.step - 1, config.train), batches)
            if evaluation_is_due and not stopping:
                _save_checkpoint(state, train_set, config, log)  # if the evaluation fails, --resume begins with it
                _evaluate(state, val_set, config, device, log)
            if checkpoint_is_due or stopping or state.has_ended(config.train):
                _save_checkpoint(state, train_set, config, log)
            if stopping:
                log.info(f"stopped by a signal after step {state.step}; continue with --resume")
            if stopping or state.has_ended(config.train):
                break
        return _end(log)


def _end(log: Logbook) -> dict[str, Any]:
    """The last entry of eval.json. Raises RunError in process 0, which has written everything, if scorers disagree."""
    last = log.last_evaluation()
    if log.active and "disagreement" in last:
        raise RunError(last["disagreement"])
    return last


def _check_batch_size(config: Config, world: int) -> None:
    if config.train.batch_size % (world * config.train.accumulate):
        raise RunError(
            f"train.batch_size {config.train.batch_size} is not a multiple of the {world} processes x "
            f"train.accumulate {config.train.accumulate}"
        )


def load_datasets(config: Config, log: Logbook) -> tuple[CocoDataset, CocoDataset]:
    """Training and validation data. Raises RunError if the checks that take a second or two find errors."""
    data = config.data
    train_set = CocoDataset(data.train_annotations, data.train_images, crowd=data.crowd, empty_images=data.empty_images)
    val_set = CocoDataset(data.val_annotations, data.val_images)
    if errors := quick_check(train_set, val_set, config):
        listed = "\n".join(f"  {error}" for error in errors)
        raise RunError(
            f"the data has errors:\n{listed}\n"
            "python tools/check_data.py with the same config and settings says what they do and what to do about them"
        )
    for split, dataset in (("train", train_set), ("val", val_set)):
        boxes = dataset.records.num_objects.sum()
        log.info(
            f"{split}: {len(dataset.records)} images, {boxes} boxes, {dataset.num_classes} classes ({dataset.folder})"
        )
        for note in dataset.notes:
            log.info(f"{split}: {note}")
    if not val_set.records.num_objects.any():
        log.info("val: no objects, so the evaluations will have no AP")
    if log.active and (shared := _image_paths(train_set) & _image_paths(val_set)):
        log.info(
            f"val: {len(shared)} of {len(val_set.records)} images are training images too: their AP measures what was "
            "learned by heart"
        )
    if sampling := describe_sampling(train_set, data):
        log.info(sampling)
    return train_set, val_set


def _image_paths(dataset: CocoDataset) -> set[str]:
    names, folder = dataset.file.file_names, os.path.realpath(dataset.folder)
    return {os.path.normpath(f"{folder}/{names[position]}") for position in dataset.records.positions.tolist()}


def _catch_up(
    state: TrainState, train_set: CocoDataset, val_set: CocoDataset, config: Config, device: torch.device, log: Logbook
) -> None:
    """What is due at the step of the checkpoint, before the next step."""
    if state.changes and state.changes[-1]["step"] == state.step:
        if log.active:
            _move_best(config)
        if best_is_later := broadcast(log.active and _best_is_later(state, config)):
            state.best, state.evaluations_since_best = -1.0, 0
        _save_checkpoint(state, train_set, config, log)  # so that previous.pt is never from before the change
        if best_is_later and log.active:  # last, because a run that is killed before it comes here again
            (config.run_dir / checkpoint.BEST).unlink()
    if state.evaluated_step < state.step and _is_due(state.step, config.train.eval_every, config):
        _evaluate(state, val_set, config, device, log)  # the run was stopped before this evaluation
        _save_checkpoint(state, train_set, config, log)
    if state.has_ended(config.train) and config.train.keep == "weights":
        _save_checkpoint(state, train_set, config, log)  # the run had ended with train.keep=all


def _move_best(config: Config) -> None:
    """Write the present places of the data into best.pt, if they have changed."""
    best = config.run_dir / checkpoint.BEST
    with contextlib.suppress(checkpoint.CheckpointError, FileNotFoundError):
        state = checkpoint.load(best)
        saved = config_from_yaml(state["config"])
        places = {name: value for name, value in config.data.model_dump().items() if f"data.{name}" in KEYS_OF_PLACE}
        moved = saved.model_copy(update={"data": saved.data.model_copy(update=places)})
        if moved != saved:
            checkpoint.save(best, state | {"config": moved.to_yaml()})


def _best_is_later(state: TrainState, config: Config) -> bool:
    """Whether best.pt is of a step that this run, which was changed, will not have again; or is damaged."""
    best = config.run_dir / checkpoint.BEST
    if not best.exists():
        return False
    try:
        return bool(checkpoint.load(best)["step"] > state.step)
    except checkpoint.CheckpointError:
        return True


def _save_checkpoint(state: TrainState, train_set: CocoDataset, config: Config, log: Logbook) -> None:
    """Process 0 saves the run, or only the weights that were evaluated at its end, with train.keep=weights."""
    if not log.active:
        return
    metadata = checkpoint_metadata(config, train_set)
    if config.train.keep == "weights" and state.has_ended(config.train) and state.evaluated_step == state.step:
        # In this order: after a kill in between, last.pt is still complete and the end of the run is repeated.
        for name in (checkpoint.PREVIOUS, checkpoint.BEST):
            (config.run_dir / name).unlink(missing_ok=True)
        checkpoint.save(config.run_dir / checkpoint.LAST, state.evaluated_weights() | metadata)
    else:
        checkpoint.save_last(config.run_dir, state.state_dict() | metadata)


def _evaluate(state: TrainState, dataset: CocoDataset, config: Config, device: torch.device, log: Logbook) -> None:
    """Evaluate on all processes; process 0 writes the result, and best.pt if it is the best so far."""
    results, unreadable = inference_on_dataset(state.eval_model, dataset, config, device)
    state.evaluated_step = state.step
    value, metric = None, config.train.best_metric
    if log.active:
        for reason in unreadable.values():
            log.info(f"not evaluated: {reason}")
        columns = results_columns(results, dataset.file)
        evaluation = score(dataset.file, columns, unreadable)
        value = evaluation.metrics[metric]
    value = broadcast(value)
    is_best = value is not None and value > state.best
    if is_best:
        state.best, state.evaluations_since_best = value, 0
    elif value is not None:
        state.evaluations_since_best += 1
    if log.active:
        if state.has_ended(config.train):
            evaluation, disagreement = confirm(evaluation, dataset.file, columns, unreadable)
            if disagreement:  # in eval.json, so that a run that is resumed after its end fails as well
                evaluation = evaluation._replace(metrics=evaluation.metrics | {"disagreement": disagreement})
        log.log_evaluation(state.step, evaluation, results, dataset, unreadable)
        if is_best:
            best = {**state.state_dict(), "optimizer": {}}  # best.pt is for evaluation, a run does not resume from it
            checkpoint.save(config.run_dir / checkpoint.BEST, best | checkpoint_metadata(config, dataset))
    if value is None:
        log.info(f"no {metric}, because no validation image has an object that counts for it: no best.pt is written")
    elif state.has_stopped_early(config.train):
        log.info(
            f"stopped early after step {state.step}: the last {config.train.early_stop} evaluations have no {metric} "
            f"above {100 * state.best:.1f}"
        )


def _is_due(step: int, every: int, config: Config) -> bool:
    """Whether an action of period `every` (0: never), also due after the last step, is due after `step`."""
    return step == config.train.steps or (every > 0 and step % every == 0)


@contextlib.contextmanager
def _deterministic_cudnn() -> Iterator[None]:
    """For equal bits of the gradients of convolutions; it costs no measurable time (docs/results/gpu.md)."""
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


@contextlib.contextmanager
def _catch_stop_signals(rank: int) -> Iterator[list[int]]:
    """A list that collects the signals that ask the run to stop. The same one later ends the process at once.

    Slurm and a terminal send a signal to every process of a job, and torchrun and tools/ablate.py pass it on to the
    processes that they started. So a signal may come twice, and only one after REPEAT_SECONDS is a second request.
    """
    received: list[int] = []
    first_time: dict[int, float] = {}

    def handle(number: int, _: object) -> None:
        received.append(number)
        is_first = number not in first_time
        if time.monotonic() > first_time.setdefault(number, time.monotonic()) + REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif is_first and rank == 0:
            with contextlib.suppress(OSError):  # Ctrl-C also ends a `tee` that reads this
                os.write(2, STOPPING)

    # A signal that is ignored stays ignored, as nohup wants it.
    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
