"""A trained detector at work: on a data set with its COCO numbers, on one image, and by the clock. Knows no training."""

from retina.evaluate.coco import Evaluation, run_detector, score, table
from retina.evaluate.inference import load_detector, predict

__all__ = ["Evaluation", "load_detector", "predict", "run_detector", "score", "table"]
