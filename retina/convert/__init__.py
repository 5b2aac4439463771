"""Converts other annotation formats to COCO JSON, the only format that training reads.

Imports no torch and nothing of the detector: a converter reads files and writes a COCO file.
"""

from retina.convert.voc import convert_voc
from retina.convert.yolo import convert_yolo

__all__ = ["convert_voc", "convert_yolo"]
