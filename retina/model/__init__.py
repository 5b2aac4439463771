"""The network: backbone, anchors, heads, and its weights in files. Knows no loss function and no data set."""

from retina.model.anchors import make_anchors
from retina.model.pretrained import WeightsError, load_pretrained
from retina.model.retinanet import Outputs, RetinaNet

__all__ = ["Outputs", "RetinaNet", "WeightsError", "load_pretrained", "make_anchors"]
