"""Pictures and pages: boxes on images, curves of a run, reports.

The files here read result files. They import neither torch nor any other package of retina.
"""

from retina.plots.boxes import draw_boxes
from retina.plots.detections import plot_detections
from retina.plots.run import plot_precision_recall, plot_run
from retina.plots.style import PALETTE, class_color

__all__ = ["PALETTE", "class_color", "draw_boxes", "plot_detections", "plot_precision_recall", "plot_run"]
