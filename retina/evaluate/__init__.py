"""A trained detector: inference, COCO evaluation, latency, the distribution of its loss."""

from retina.evaluate.coco import Evaluation, evaluate_detections, format_metrics, inference_on_dataset
from retina.evaluate.inference import load_detector, predict

__all__ = ["Evaluation", "evaluate_detections", "format_metrics", "inference_on_dataset", "load_detector", "predict"]
