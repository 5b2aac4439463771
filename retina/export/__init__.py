"""A trained detector as one file that runs without this package: ONNX, or a package compiled by AOTInductor.

uint8 images in, boxes in their pixels out: program.py. The steps of tools/export.py are network.py (BatchNorm folded,
precision), int8.py (calibration), onnx.py or aot.py (the file), exported.py (runs it), verify.py (compares it).
"""

from retina.export.exported import ExportedDetector, ExportError, exported_on_dataset
from retina.export.job import Job, export
from retina.export.program import InputShape

__all__ = ["ExportError", "ExportedDetector", "InputShape", "Job", "export", "exported_on_dataset"]
