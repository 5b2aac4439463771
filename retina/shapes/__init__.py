"""The generated data set: random images of textured shapes, written as a folder in COCO format.

`outlines` has the classes, `layout` places objects and makes their annotations, `painting` draws pixels, `scene` makes
one image from these, `writing` writes the folder. Nothing here is imported by the detector: training reads that folder
like any other COCO data set.
"""

from retina.shapes.layout import CATEGORIES
from retina.shapes.outlines import CLASSES
from retina.shapes.scene import draw_scene
from retina.shapes.settings import ShapesSettings, load_settings
from retina.shapes.writing import make_missing_shapes, write_shapes

__all__ = [
    "CATEGORIES",
    "CLASSES",
    "ShapesSettings",
    "draw_scene",
    "load_settings",
    "make_missing_shapes",
    "write_shapes",
]
