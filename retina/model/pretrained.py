"""Initial weights for a model: `load_pretrained` reads them, checks that they fit, and loads them.

A key that is not known, or a key of ours that gets no value, is an error.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from retina.config import Config
from retina.model.retinanet import RetinaNet
from retina.model.weights import INVISIBLE_SETTINGS, Weights, network_settings, read_weights
from retina.model.weights_file import WeightsError


def load_pretrained(model: RetinaNet, config: Config, source: str, names: list[str]) -> tuple[bool, str]:
    """Load weights into `model`, in place.

    The class outputs of names that the data set and the weights have in common are kept. The others keep their initial
    values. Weights without names, of as many classes, are taken in their order.

    Args:
        model: the detector.
        config: its settings.
        source: a published name or a file, see `read_weights`.
        names: the classes of the data set.

    Returns: whether all weights are now those of a trained detector, and a message for the log.

    Raises:
        FileNotFoundError: `source` is unknown or cannot be downloaded; the message explains what to do.
        WeightsError: the file cannot be read, or its weights do not fit; the message names settings that differ.
        CheckpointError: a damaged checkpoint of this project.
        ConfigError: the settings in a checkpoint do not fit this version of the program.
    """
    return load_weights(model, config, read_weights(source, config.model.backbone), names)


def load_weights(model: RetinaNet, config: Config, weights: Weights, names: list[str]) -> tuple[bool, str]:
    """As `load_pretrained`, with weights that were read before."""
    _check_shapes(weights, model, config)
    if weights.is_detector:
        state, is_complete, message = _choose_class_outputs(_in_own_order(weights, config), weights, model, names)
        load_exactly(model, state, weights.source)
    else:
        body = {key.removeprefix("backbone.body."): value for key, value in weights.state.items()}
        load_exactly(model.backbone.body, body, weights.source)
        is_complete, message = False, "FPN and heads start from random values"
    message = f"weights: {weights.origin} from {weights.source}; {message}"
    return is_complete, message + _other_settings(weights, config)


def load_exactly(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """`load_state_dict` that raises WeightsError naming each tensor that is missing, not used or of another shape.

    BatchNorm's `num_batches_tracked` may be missing or unused: frozen layers have none, and BatchNorm with a fixed
    momentum never reads it. `source` names the weights in messages.
    """
    own = module.state_dict()
    state = {key: value for key, value in state.items() if key in own or not key.endswith("num_batches_tracked")}
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unused = [key for key in state if key not in own]
    wrong_shape = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    for problem, keys in (("missing", missing), ("not used", unused), ("of another shape", wrong_shape)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise WeightsError(
                f"{source}: {problem}: {', '.join(keys[:3])}{more}; is it the backbone and norm of the config?"
            )
    module.load_state_dict(own | state)


def _check_shapes(weights: Weights, model: RetinaNet, config: Config) -> None:
    """Raise WeightsError with the settings that give the model other shapes than the weights have."""
    own = network_settings(model.state_dict())
    differences = []
    for key, value in network_settings(weights.state).items():
        here = own.get(key)  # None: this backbone does not have it
        if value == here:
            continue
        if key == "anchors":
            product = f"anchors.scales={config.anchors.scales} times {len(config.anchors.ratios)} anchors.ratios"
            differences.append(f"{value} anchors in a cell, the config {here} ({product})")
        else:
            differences.append(f"{key}={value}, the config {here}")
    if differences:
        raise WeightsError(f"{weights.source} does not fit the model: it has {'; '.join(differences)}")


def _other_settings(weights: Weights, config: Config) -> str:
    """For the log: the settings of `config` by which the network computes something else than it did in training."""
    given = config.flat()
    differences = [
        f"{key}={weights.settings[key]} (here {given[key]})"
        for key in INVISIBLE_SETTINGS
        if key in weights.settings and weights.settings[key] != given[key]
    ]
    if not differences:
        return ""
    hint = f"; see configs/presets/{weights.preset}.yaml" if weights.preset else ""
    return f"\nwarning: these weights were trained with {', '.join(differences)}{hint}"


def _in_own_order(weights: Weights, config: Config) -> dict[str, Tensor]:
    """The state with the anchors of a cell in our order: all sizes of the first ratio come first."""
    if not weights.orders_anchors_by_size:
        return weights.state
    sizes, ratios = config.anchors.scales, len(config.anchors.ratios)
    reordered = {
        key: value.reshape(sizes, ratios, -1, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
        for key, value in weights.state.items()
        if key.startswith(("cls_logits.", "bbox_reg."))
    }
    return weights.state | reordered


def _choose_class_outputs(
    state: dict[str, Tensor], weights: Weights, model: RetinaNet, names: list[str]
) -> tuple[dict[str, Tensor], bool, str]:
    """The state with the class outputs for `names`, whether the weights have all of them, and a message for the log."""
    known = [name for _, name in weights.categories or []]
    if known == names:
        return state, True, f"all {weights.classes} class outputs"
    if weights.categories is None and weights.classes == len(names):
        return state, True, f"they name no classes; their {weights.classes} class outputs are taken in their order"
    place = {name: i for i, name in enumerate(known)}
    kept = [i for i, name in enumerate(names) if name in place]
    new = [name for name in names if name not in place]
    chosen: dict[str, Any] = {}
    for key, initial in model.cls_logits.state_dict().items():
        theirs = state[f"cls_logits.{key}"].reshape(-1, weights.classes, *initial.shape[1:])
        ours = initial.clone().reshape(-1, len(names), *initial.shape[1:])
        ours[:, kept] = theirs[:, [place[names[i]] for i in kept]].to(ours)
        chosen[f"cls_logits.{key}"] = ours.flatten(0, 1)
    message = f"kept {len(kept)} of {len(names)} class outputs"
    if kept and new:
        message += f" ({_listed([names[i] for i in kept])})"
    return state | chosen, not new, message + (f"; {_listed(new)} start from the prior" if new else "")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
