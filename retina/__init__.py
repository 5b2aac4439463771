"""RetinaNet with the focal loss. This file imports nothing, so a usage error is reported before torch is imported."""

__version__ = "0.1.0"
