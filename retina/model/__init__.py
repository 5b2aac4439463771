"""The network: backbone, anchors, heads, and the files of its weights. It imports nothing of data sets or training."""

from retina.model.anchors import make_anchors
from retina.model.checkpoint import CheckpointError
from retina.model.pretrained import load_pretrained
from retina.model.retinanet import Outputs, RetinaNet
from retina.model.weights import read_weights
from retina.model.weights_file import WeightsError

__all__ = [
    "CheckpointError", "Outputs", "RetinaNet", "WeightsError", "load_pretrained", "make_anchors", "read_weights",
]  # fmt: skip
