"""RetinaNet with the focal loss. Nothing is imported here: a configuration error costs no import of torch."""

__version__ = "0.1.0"
