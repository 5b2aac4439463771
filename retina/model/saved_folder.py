"""A folder with the weights and the settings of a detector, and nothing in it that could run code.

    model.safetensors    the tensors; its metadata has settings and categories too, for the file alone
    config.json          settings, categories, step, and the metrics of these weights where they are known

retina/hub.py adds a model card and shares it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from retina.atomic_files import atomic_file, write_text
from retina.config import Config
from retina.config_file import config_from_flat, config_from_yaml
from retina.model.weights import Weights, read_weights
from retina.model.weights_file import WeightsError

WEIGHTS, SETTINGS = "model.safetensors", "config.json"


def is_saved_folder(path: Path) -> bool:
    """Whether it is a folder by `save_folder`, valid or not."""
    return (path / SETTINGS).is_file()


def save_folder(folder: Path, weights: Weights, metrics: dict[str, Any]) -> None:
    """Write the two files; the folder is made if it is missing.

    Args:
        folder: to write to.
        weights: of this project, with settings and categories.
        metrics: as in eval.json; empty where they are not known.

    Raises ImportError, which says what to install, without safetensors.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("saving a detector needs safetensors: pip install safetensors") from error
    config = config_from_flat(weights.settings)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"config": config.to_yaml(), "categories": json.dumps(weights.categories), "format": "pt"}
    with atomic_file(folder / WEIGHTS) as temporary:
        save_file({key: value.contiguous() for key, value in weights.state.items()}, temporary, metadata)
    settings = {
        "step": weights.step,
        "categories": weights.categories,
        "metrics": metrics,
        "config": config.model_dump(mode="json"),
    }
    write_text(folder / SETTINGS, json.dumps(settings, indent=1))


def read_folder(folder: Path) -> Weights:
    """What `save_folder` wrote, with the settings and categories of config.json.

    Raises WeightsError if a file is missing or damaged; ConfigError for settings of another version of the program.
    """
    settings = _read_settings(folder)
    config = config_from_yaml(json.dumps(settings["config"]))
    try:
        categories = [(int(i), str(name)) for i, name in settings["categories"]]
    except (TypeError, ValueError):
        raise WeightsError(f"{folder / SETTINGS}: categories: expected a list of [id, name]") from None
    weights = read_weights(str(folder / WEIGHTS))
    return weights._replace(source=str(folder), settings=config.flat(), categories=categories, step=settings["step"])


def saved_metrics(folder: Path) -> dict[str, Any]:
    """The metrics that were given to `save_folder`."""
    metrics: dict[str, Any] = _read_settings(folder)["metrics"]
    return metrics


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not readable: {error}") from None
    keys = ("step", "categories", "metrics", "config")
    if not isinstance(settings, dict) or not all(key in settings for key in keys):
        raise WeightsError(f"{path}: not the settings of a saved detector: expected the keys {', '.join(keys)}")
    return settings


def without_absolute_paths(config: Config) -> Config:
    """With only their last parts: the rest tells about the machine of the training, and is of no use on another."""

    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shorten(each) for key, each in value.items()}
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    return Config.model_validate(shorten(config.model_dump(mode="json")))
