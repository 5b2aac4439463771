"""Shares a detector on the Hugging Face Hub, or in a folder, by huggingface_hub's mixin.

    HubDetector(retina.load("runs/bccd")).push_to_hub("me/blood-cells")
    detector = HubDetector.from_pretrained("me/blood-cells")      # also a folder of save_pretrained
    detections = detector(image)

The folder has model.safetensors and config.json (model/saved_folder.py) and a model card, README.md, with the metrics
of the run. `retina.load` reads such a folder too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from retina.config import COCO_METRICS, Config
from retina.evaluate.detector import Detector
from retina.evaluate.loading import find_weights, load
from retina.model.checkpoint import CheckpointError, digest
from retina.model.saved_folder import SETTINGS, WEIGHTS, save_folder, saved_metrics, without_absolute_paths
from retina.model.weights import Weights
from retina.model.weights_file import WeightsError

try:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData, ModelHubMixin, snapshot_download
except ImportError as error:
    raise ImportError(
        "retina.hub needs huggingface_hub and safetensors: pip install huggingface_hub safetensors"
    ) from error

LOSSES = {  # for the model card
    "focal": "focal loss", "focal_star": "focal loss FL*",
    "ohem": "online hard example mining", "ohem_1_3": "online hard example mining, 1:3",
}  # fmt: skip


class HubDetector(Detector, ModelHubMixin):
    """A `Detector` with `save_pretrained`, `push_to_hub` and `from_pretrained` of `huggingface_hub.ModelHubMixin`.

    Args:
        detector: with weights of this project, or others. Of a run, its step and the metrics of its eval.json are saved
            too, unless the weights have changed.
    """

    def __init__(self, detector: Detector) -> None:
        d, config = detector, without_absolute_paths(detector.config)
        super().__init__(d.model, config, d.categories, d.device, d.source, d.file, d.step)
        self.step, self.metrics = self._known = step_and_metrics(detector)
        self._weights = digest(self.model.state_dict())

    def current_step_and_metrics(self) -> tuple[int | None, dict[str, Any]]:
        """`step` and `metrics`; None and {} if the weights were trained further, and these two not set since."""
        stale = (self.step, self.metrics) == self._known and digest(self.model.state_dict()) != self._weights
        return (None, {}) if stale else (self.step, self.metrics)

    def _save_pretrained(self, save_directory: Path) -> None:
        step, metrics = self.current_step_and_metrics()
        state = self.model.state_dict()
        weights = Weights(state, "", "", self.categories, self.config.flat(), preset=None, step=step)
        save_folder(save_directory, weights, metrics)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, device: str | torch.device | None = None, **download: Any
    ) -> HubDetector:
        folder = model_id
        if not Path(model_id).is_dir():
            folder = snapshot_download(model_id, allow_patterns=[WEIGHTS, SETTINGS], **download)
        return cls(load(folder, device=device))

    def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
        """README.md of the folder."""
        return ModelCard(model_card(self))


def step_and_metrics(detector: Detector) -> tuple[int | None, dict[str, Any]]:
    """The step of these weights, and what the evaluation during the training says of them.

    None if the weights differ from those in the file, as after a training of one's own, or if it is gone. The metrics
    are empty then, too, and if the file is not in its run folder.
    """
    if detector.file is None or detector.step is None:
        return detector.step, {}
    try:
        saved, state = find_weights(str(detector.file)).state, detector.model.state_dict()
    except (FileNotFoundError, WeightsError, CheckpointError):
        return None, {}
    if not all(torch.equal(tensor.cpu(), saved[key]) for key, tensor in state.items() if key in saved):
        return None, {}
    if detector.file.is_dir():
        return detector.step, saved_metrics(detector.file)
    evaluations = detector.file.parent / "eval.json"
    entries = json.loads(evaluations.read_text(encoding="utf-8")) if evaluations.is_file() else []
    found = [entry for entry in entries if entry["step"] == detector.step]
    metrics = {key: value for key, value in found[-1].items() if key != "step"} if found else {}
    return detector.step, metrics


def model_card(detector: HubDetector) -> str:
    """The model card as Markdown, with the metadata that the Hub shows."""
    config, names = detector.config, [name for _, name in detector.categories]
    step, metrics = detector.current_step_and_metrics()
    dataset = Path(config.data.val_annotations).stem
    results = [
        EvalResult("object-detection", "coco-format", dataset, name, round(metrics[name], 4), metric_name=name)
        for name in COCO_METRICS
        if metrics.get(name) is not None
    ]
    data = ModelCardData(
        library_name="retina",
        pipeline_tag="object-detection",
        tags=["retinanet", *(["focal-loss"] if config.loss.cls == "focal" else [])],
        model_name=config.name,
        eval_results=results or None,
    )
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---",
            f"# {config.name}",
            "",
            f"A RetinaNet ({config.model.backbone}, {LOSSES[config.loss.cls]}) that finds {len(names)} classes: "
            f"{', '.join(names)}.",
            "",
            "```python",
            "from retina.hub import HubDetector  # needs huggingface_hub and safetensors",
            "",
            'detector = HubDetector.from_pretrained("OWNER/NAME")',
            "detections = detector(image)  # a path, a PIL image, a uint8 RGB array or tensor, or a list of them",
            "```",
            "",
            *_metrics_section(metrics, dataset, step),
            "## Settings",
            "",
            "Those that differ from the defaults; config.json has all.",
            "",
            "```yaml",
            *(f"{key}: {json.dumps(value)}" for key, value in _changed_settings(config).items()),
            "```",
            "",
        ]
    )


def _metrics_section(metrics: dict[str, Any], dataset: str, step: int | None) -> list[str]:
    if not metrics:
        return []
    known = [name for name in COCO_METRICS if metrics.get(name) is not None]
    classes = [
        f"| {name.replace('|', '&#124;')} | {100 * ap:.1f} |"
        for name, ap in metrics.get("per_class", {}).items()
        if ap is not None
    ]
    return [
        "## Metrics",
        "",
        f"COCO metrics in percent on the validation data of the training, {dataset}, after step {step}.",
        "",
        f"| {' | '.join(known)} |",
        "|---" * len(known) + "|",
        f"| {' | '.join(f'{100 * metrics[name]:.1f}' for name in known)} |",
        "",
        *(["| Class | AP |", "|---|---|", *classes, ""] if classes else []),
    ]


def _changed_settings(config: Config) -> dict[str, Any]:
    defaults = Config().flat()
    return {key: value for key, value in config.flat().items() if value != defaults[key]}
