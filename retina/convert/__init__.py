"""Converts other annotation formats to COCO JSON, the only format that training reads. Imports no torch."""

from retina.convert.voc import convert_voc

__all__ = ["convert_voc"]
