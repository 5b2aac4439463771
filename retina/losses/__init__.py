"""Loss functions for classification and box regression, class weights, and the losses as modules.

The files here import nothing but torch: no data sets, models or settings belong in this package. docs/losses.md
explains which loss fits which task.
"""

from retina.losses.box import giou_loss, l1_loss, smooth_l1_loss
from retina.losses.class_weights import class_counts, class_weights, prior_bias
from retina.losses.focal import focal_star_loss, sigmoid_focal_loss
from retina.losses.mining import ohem_loss
from retina.losses.modules import FocalNLLLoss, FocalStarLoss, OHEMLoss, SigmoidFocalLoss, SoftmaxFocalLoss
from retina.losses.softmax import focal_nll_loss, softmax_focal_loss

__all__ = [
    "FocalNLLLoss",
    "FocalStarLoss",
    "OHEMLoss",
    "SigmoidFocalLoss",
    "SoftmaxFocalLoss",
    "class_counts",
    "class_weights",
    "focal_nll_loss",
    "focal_star_loss",
    "giou_loss",
    "l1_loss",
    "ohem_loss",
    "prior_bias",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "softmax_focal_loss",
]
