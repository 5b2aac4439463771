"""Losses that stand alone: they import nothing but torch. docs/losses.md says which one is for what."""

from retina.losses.box import giou_loss, l1_loss, smooth_l1_loss
from retina.losses.class_weights import class_weights, prior_bias
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
