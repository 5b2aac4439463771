"""A trained detector: load it, call it with images, COCO evaluation, latency, the distribution of its loss.

Nothing here changes weights: training imports this package, and this package imports nothing of training.
"""

from retina.analysis.scoring import Evaluation
from retina.evaluate.coco import evaluate_detections, format_metrics, inference_on_dataset
from retina.evaluate.cost import Cost, describe_cost, measure_cost
from retina.evaluate.detections import ImageDetections
from retina.evaluate.detector import Detector
from retina.evaluate.loading import build_detector, default_source, find_weights, load, trained_config
from retina.evaluate.loss_distribution import LossDistribution, measure_loss_distribution
from retina.evaluate.tta import inference_with_tta

__all__ = [
    "Cost",
    "Detector",
    "Evaluation",
    "ImageDetections",
    "LossDistribution",
    "build_detector",
    "default_source",
    "describe_cost",
    "evaluate_detections",
    "find_weights",
    "format_metrics",
    "inference_on_dataset",
    "inference_with_tta",
    "load",
    "measure_cost",
    "measure_loss_distribution",
    "trained_config",
]
