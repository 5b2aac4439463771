"""Makes a detector from trained weights: `load`, which Python users and the commands in tools/ call."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from retina.config import Config
from retina.config_file import ConfigError, config_from_flat, load_config, load_preset
from retina.device import pick_device
from retina.evaluate.detector import Detector
from retina.file_suffixes import EXPORT_SUFFIXES
from retina.model import checkpoint
from retina.model.pretrained import load_weights
from retina.model.retinanet import RetinaNet
from retina.model.saved_folder import is_saved_folder, read_folder
from retina.model.weights import TORCHVISION_DETECTORS, Categories, Weights, read_weights
from retina.model.weights_file import WeightsError


def load(
    source: str | os.PathLike[str],
    config: str | os.PathLike[str] | Config | None = None,
    *,
    device: str | torch.device | None = None,
) -> Detector:
    """A trained detector, ready to be called with images.

    Args:
        source: a checkpoint (best.pt, last.pt); a run folder, of which it takes best.pt, or last.pt without one; a
            folder of `HubDetector.save_pretrained`; COCO_V1 or COCO_V2, torchvision's RetinaNets, which are downloaded
            once; or a RetinaNet of torchvision, detectron2 or mmdetection, with the settings of its preset.
        config: a YAML file or a `Config`, in place of the settings that the weights were trained with. Its network and
            anchors must be the same.
        device: such as "cpu" or "cuda:1"; None: a CUDA device if there is one.

    Raises:
        FileNotFoundError: no such file, no checkpoint in the folder, or the weights cannot be downloaded.
        CheckpointError: a damaged checkpoint.
        WeightsError: the file cannot be read, or the weights do not fit the config.
        ConfigError: no such config or device, or settings of another version of the program.
        OSError: a path cannot be looked at, as in a folder without permission.
    """
    settings = load_config(Path(config)) if isinstance(config, str | os.PathLike) else config
    weights = find_weights(source, settings.model.backbone) if settings else find_weights(source)
    return build_detector(weights, settings, device=device)


def find_weights(source: str | os.PathLike[str], backbone: str = "resnet50") -> Weights:
    """Read the weights of a detector; `source` as for `load`. Published weights of another backbone are an error."""
    path = Path(source)
    if path.is_file() and path.suffix in EXPORT_SUFFIXES.values():
        raise WeightsError(
            f"{path} is an exported file: retina.export.ExportedDetector runs it, and tools/eval.py "
            "--checkpoint evaluates it"
        )
    if is_saved_folder(path):
        weights = read_folder(path)
    elif path.is_dir():
        weights = read_weights(str(find_checkpoint(path)))
    elif path.is_file() or str(source) in TORCHVISION_DETECTORS:
        weights = read_weights(str(source), backbone)
    else:
        raise FileNotFoundError(
            f"{path}: no such checkpoint or run folder; torchvision's weights are {', '.join(TORCHVISION_DETECTORS)}"
        )
    if not weights.is_detector:
        raise WeightsError(f"{weights.source}: {weights.origin} is not a detector")
    return weights


def find_checkpoint(folder: Path) -> Path:
    """best.pt of a run folder, or its last.pt. Raises FileNotFoundError if it has neither."""
    for name in (checkpoint.BEST, checkpoint.LAST):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no checkpoint in {folder}: neither {checkpoint.BEST} nor {checkpoint.LAST}")


def default_source(config: Config) -> str | Path:
    """What is evaluated without --checkpoint: the run of `config`, or `model.weights` if they can be a detector.

    Raises FileNotFoundError if there is neither.
    """
    try:
        return find_checkpoint(config.run_dir)
    except FileNotFoundError as error:
        weights = config.model.weights
        if weights is not None and (weights in TORCHVISION_DETECTORS or Path(weights).is_file()):
            return weights
        raise FileNotFoundError(f"{error}; train first, or give --checkpoint FILE") from None


def trained_config(weights: Weights) -> Config:
    """The settings that the weights were trained with; of another framework, its preset with what the weights show."""
    if weights.is_own:
        return config_from_flat(weights.settings)
    if weights.preset is None:
        raise ConfigError(f"{weights.source}: no settings are known for {weights.origin}; give a config")
    return config_from_flat(load_preset(weights.preset).flat() | weights.known_settings)


def build_detector(
    weights: Weights,
    config: Config | None = None,
    categories: Categories | None = None,
    device: str | torch.device | None = None,
) -> Detector:
    """The detector with these weights.

    Args:
        weights: of `find_weights`.
        config: see `load`.
        categories: of a data set. Weights of this project must have been trained on the same ones; of others, the class
            outputs are selected by their names. None: those of the weights.
        device: see `load`.

    Raises: as `load`.
    """
    own = trained_config(weights) if weights.is_own else None
    config = config or own or trained_config(weights)
    if own is not None:
        if categories is not None and weights.categories != categories:
            raise WeightsError(
                f"{weights.source} was trained on other categories, {weights.categories}; the data set has {categories}"
            )
        _check_settings(config, own, weights.source)
    used = categories or weights.categories or [(i, f"class {i}") for i in range(weights.classes)]
    model = RetinaNet(config, len(used))
    is_complete, message = load_weights(model, config, weights, [name for _, name in used])
    if not is_complete:
        raise WeightsError(f"{weights.source} is not a detector for these classes ({message})")
    where = _device(device)
    model.to(where, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
    file = None if weights.source in TORCHVISION_DETECTORS else Path(weights.source)
    origin = message if weights.step is None else f"{weights.source}, step {weights.step}"
    return Detector(model, config, used, where, origin, file, weights.step)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return pick_device()
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {str(device)!r}: {reason}") from None


def _check_settings(config: Config, trained: Config, file: str) -> None:
    """Raise WeightsError if `config` has settings of the network by which the checkpoint was not trained."""
    before, given = trained.flat(), config.flat()
    fixed = [
        key
        for key in before
        if (key.startswith(("model.", "anchors.")) and key not in ("model.weights", "model.frozen_stages"))
        or key in ("detect.max_ratio", "data.normalization")
    ]
    changed = [f"{key} was {before[key]}, is {given[key]}" for key in fixed if before[key] != given[key]]
    if changed:
        raise WeightsError(f"{file} was trained with other settings than the config's: {'; '.join(changed)}")
