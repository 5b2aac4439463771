"""Losses that stand alone: they import nothing but torch."""

from retina.losses.box import giou_loss, l1_loss, smooth_l1_loss
from retina.losses.focal import sigmoid_focal_loss

__all__ = ["giou_loss", "l1_loss", "sigmoid_focal_loss", "smooth_l1_loss"]
