"""How a run starts: from the newest checkpoint of its folder, from pretrained weights, or from random ones.

A checkpoint must fit the settings and the data. What may differ is said, and noted in changes.json.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from retina.config import Config
from retina.config_file import KEYS_OF_PLACE, KEYS_TO_CHANGE, KEYS_WITHOUT_EFFECT, changed_keys, config_from_yaml
from retina.data.coco import CocoDataset
from retina.device import autocast, compile_network
from retina.model import checkpoint
from retina.model.pretrained import load_pretrained
from retina.model.retinanet import RetinaNet
from retina.train.distributed import all_gather_list, broadcast, world_size
from retina.train.errors import RunError
from retina.train.logbook import Logbook, describe_changes
from retina.train.schedule import build_optimizer, learning_rate
from retina.train.state import TrainState, checkpoint_metadata, data_digest


def create_train_state(
    config: Config, dataset: CocoDataset, val_set: CocoDataset, device: torch.device, resume: bool, log: Logbook
) -> TrainState:
    """The state at the start of a run: the newest valid checkpoint of its folder, pretrained or random weights.

    Raises RunError for a checkpoint or settings that do not fit, CheckpointError if no checkpoint of the run can be
    read, and for `model.weights` what `load_pretrained` does.
    """
    torch.manual_seed(config.seed)
    model: RetinaNet = RetinaNet(config, dataset.num_classes)
    saved, refused = checkpoint.load_newest(config.run_dir) if resume and log.active else (None, [])
    for reason in refused:
        log.info(f"refused {reason}")
    saved = broadcast(saved)  # the log checks later that all see its disk
    if world_size() > 1:
        model = _synchronize_batch_norm(model, config, device)
    if saved is None:
        _initialize_weights(model, config, dataset.names, log)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = TrainState(
        model,
        copy.deepcopy(model).requires_grad_(False) if config.train.ema else None,
        build_optimizer(model, config.train),
        torch.tensor(config.loss.ema_start, device=device),
        "bf16" if autocast(device, config.train.precision)._enabled else "fp32",
        data_digest(dataset),
        data_digest(val_set, evaluated=True),
    )
    _check_processes(state, config)
    if saved is None and resume:
        log.info(f"no checkpoint in {config.run_dir}: the run starts at step 0")
    if saved is not None:
        _check_saved_state(saved, state, config, dataset)
        state.load_state_dict(saved)
        log.info(f"resumed after step {state.step}")
        _note_other_data(saved, state, dataset, val_set, config, log)
        for change in _changes(config_from_yaml(saved["config"]), config, state.step):
            state.changes.append(change)
            log.info(f"from step {state.step} on: {change['key']} {change['from']} -> {change['to']}")
        # Another machine may have the data at another path.
        shared = state.changes, state.best, state.evaluations_since_best
        state.changes, state.best, state.evaluations_since_best = broadcast(shared)
    if config.train.compile:
        # Graphs overwrite the gradients of the micro-batch before; with several processes they have not been tried.
        compile_network(model, device, graphs=config.train.accumulate == 1 and world_size() == 1)
    peak = config.train.lr * config.train.batch_size / config.train.reference_batch
    log.info(
        f"{device}, {state.precision}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; learning "
        f"rate {config.train.lr:g} for {config.train.reference_batch} images a step, {peak:g} for "
        f"{config.train.batch_size}"
    )
    for line in _surprising_settings(config):
        log.info(line)
    return state


def _check_processes(state: TrainState, config: Config) -> None:
    """Raise RunError in every process if one has other settings or data than process 0."""
    settings = {k: v for k, v in config.flat().items() if k not in (*KEYS_WITHOUT_EFFECT, *KEYS_OF_PLACE)}
    annotations = {"training annotations": state.train_data, "validation annotations": state.val_data}
    processes = all_gather_list([settings | annotations | {"precision": state.precision}])
    for number, values in enumerate(processes):
        if different := [key for key, value in values.items() if processes[0][key] != value]:
            raise RunError(
                f"process {number} has another {', another '.join(different)} than process 0; all processes need the "
                "same command, settings and annotations"
            )


def _surprising_settings(config: Config) -> Iterator[str]:
    """A line for each setting that does not do what it seems to do, because of another one."""
    train, data = config.train, config.data
    if train.warmup_steps >= train.steps:
        last = learning_rate(train.steps - 1, train)
        yield (
            f"the warm-up is as long as the run: the learning rate only rises, to {last:.3g} in the last of "
            f"{train.steps} steps; train.warmup_steps is {train.warmup_steps}"
        )
    if train.early_stop and (train.eval_every == 0 or train.eval_every >= train.steps):
        yield f"train.early_stop={train.early_stop} does nothing: the only evaluation is at the end (train.eval_every)"
    if data.max_side < (largest := max(*data.short_side, data.eval_short_side or 0)):
        yield f"data.max_side={data.max_side} is below a short side of {largest}: no image becomes that large"


def _note_other_data(
    saved: dict[str, Any], state: TrainState, train_set: CocoDataset, val_set: CocoDataset, config: Config, log: Logbook
) -> None:
    """Say it, and write it to changes.json, if the data have changed or moved since the checkpoint."""

    def note(message: str, key: str, before: str, now: str) -> None:
        log.info(message)
        state.changes.append({"step": state.step, "key": key, "from": before, "to": now})

    before, now = config_from_yaml(saved["config"]).flat(), config.flat()
    for key in KEYS_OF_PLACE:
        if key != "name" and before[key] != now[key]:
            note(f"{key} has moved: {now[key]} is taken to be {before[key]}", key, before[key], now[key])
    if saved.get("train_data", state.train_data) != state.train_data:
        message = (
            f"the training annotations have changed since then ({train_set.annotations}): the run goes on with the new "
            "ones, and no longer ends as an uninterrupted run does"
        )
        note(message, "train_data", saved["train_data"], state.train_data)
    if state.has_ended(config.train) and state.evaluated_step == state.step:
        state.val_data = saved.get("val_data", state.val_data)  # that of its evaluations, if the run is continued later
    elif saved.get("val_data", state.val_data) != state.val_data:
        message = (
            f"the validation annotations have changed since then ({val_set.annotations}): the AP of the next "
            "evaluations cannot be compared with those before, and the next one is the best so far"
        )
        note(message, "val_data", saved["val_data"], state.val_data)
        state.best, state.evaluations_since_best = -1.0, 0


def _changes(old: Config, new: Config, step: int) -> list[dict[str, Any]]:
    """What --change changed since the checkpoint. `check_run_folder` has checked that it was asked for."""
    before, after = old.flat(), new.flat()
    return [
        {"step": step, "key": key, "from": before[key], "to": after[key]}
        for key in KEYS_TO_CHANGE
        if before[key] != after[key]
    ]


def _synchronize_batch_norm(model: RetinaNet, config: Config, device: torch.device) -> RetinaNet:
    if config.model.norm != "batch":
        return model
    if device.type == "cpu":
        raise RunError(
            "model.norm=batch over several processes needs CUDA, where BatchNorm can be synchronized; "
            "on the CPU use model.norm=group"
        )
    synchronized: RetinaNet = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return synchronized


def _initialize_weights(model: RetinaNet, config: Config, names: list[str], log: Logbook) -> None:
    """Load `model.weights`. Raises RunError if it is null and the settings would freeze random values."""
    if config.model.weights is not None:
        log.info(load_pretrained(model, config, config.model.weights, names)[1])
    elif config.model.norm.startswith("frozen"):
        raise RunError(
            f"model.norm={config.model.norm} keeps the statistics of pretrained weights, and model.weights is "
            "null; from scratch use model.norm=batch or group and model.frozen_stages=-1"
        )
    elif config.model.frozen_stages >= 0:
        raise RunError(
            f"model.frozen_stages={config.model.frozen_stages} keeps the weights of the first stages, and "
            "model.weights is null, so they would stay random; from scratch use model.frozen_stages=-1"
        )


def _check_saved_state(saved: dict[str, Any], state: TrainState, config: Config, dataset: CocoDataset) -> None:
    """`state`: of the new process, before it is loaded."""
    if saved["precision"] != state.precision:
        raise RunError(
            f"{config.run_dir} was trained in {saved['precision']}; on this machine, train.precision="
            f"{config.train.precision} would continue in {state.precision}"
        )
    if config.train.steps < saved["step"]:
        raise RunError(f"{config.run_dir} has {saved['step']} steps done: train.steps={config.train.steps} is too few")
    before = config_from_yaml(saved["config"])
    moved = KEYS_OF_PLACE if _has_equal_data(saved, state) else ("name",)
    if changed := changed_keys(before, config, (*KEYS_WITHOUT_EFFECT, *KEYS_TO_CHANGE, *moved)):
        why = ""
        if any(key.startswith("data.") for key in set(KEYS_OF_PLACE).intersection(changed)):
            why = "; data may move, but these annotations are not known to be those of the checkpoint"
        raise RunError(
            f"the checkpoint in {config.run_dir} is of a run with other settings "
            f"({describe_changes(before, config, changed)}{why}); use the same settings, or another output_dir"
        )
    ended_early = 0 < config.train.early_stop <= saved.get("since_best", 0)
    if not saved["optimizer"] and saved["step"] < config.train.steps and not ended_early:
        raise RunError(
            f"{config.run_dir}: the checkpoint of step {saved['step']} has weights only, because the run ended with "
            "train.keep=weights, or because it is a best.pt; without the state of the optimizer it cannot continue: "
            "start a new run with model.weights=FILE"
        )
    if ended_early and _changes(before, config, saved["step"]):
        raise RunError(
            f"{config.run_dir} ended early after step {saved['step']} (train.early_stop={config.train.early_stop}), "
            "so a --change would do nothing; start a new run with model.weights=FILE"
        )
    if [list(pair) for pair in saved["categories"]] != checkpoint_metadata(config, dataset)["categories"]:
        raise RunError(f"{config.run_dir}: the checkpoint was trained on other categories: {saved['categories']}")


def _has_equal_data(saved: dict[str, Any], state: TrainState) -> bool:
    """Whether both sets have the annotations of the checkpoint, so that they may be at another place now."""
    now = {"train_data": state.train_data, "val_data": state.val_data}
    return all(saved.get(key) == value for key, value in now.items())
