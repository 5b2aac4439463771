"""The endings by which the commands know files, here because they are checked before torch is imported."""

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
EXPORT_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}  # by --format of tools/export.py
