"""A trained detector: inference, COCO evaluation, latency, the distribution of its loss.

Nothing here changes weights: training imports this package, and this package imports nothing of training.
"""

from retina.analysis.scoring import Evaluation
from retina.evaluate.coco import (
    coco_results,
    evaluate_detections,
    final_evaluation,
    format_metrics,
    inference_on_dataset,
)
from retina.evaluate.inference import detections_to_dict, load_detector, predict
from retina.evaluate.latency import measure_latency
from retina.evaluate.loss_distribution import LossDistribution, measure_loss_distribution

__all__ = [
    "Evaluation",
    "LossDistribution",
    "coco_results",
    "detections_to_dict",
    "evaluate_detections",
    "final_evaluation",
    "format_metrics",
    "inference_on_dataset",
    "load_detector",
    "measure_latency",
    "measure_loss_distribution",
    "predict",
]
