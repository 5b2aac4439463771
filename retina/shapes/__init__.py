"""The generated data set: outlines, layout, painting, writing. Writes a COCO folder; nothing else here reads it."""

from retina.shapes.layout import CATEGORIES
from retina.shapes.outlines import CLASSES
from retina.shapes.scene import draw_scene
from retina.shapes.writing import write_shapes

__all__ = ["CATEGORIES", "CLASSES", "draw_scene", "write_shapes"]
