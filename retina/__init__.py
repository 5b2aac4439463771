"""RetinaNet with the focal loss: `retina.load` gives a trained detector.

It imports nothing before it is asked for, so a usage error is reported before torch is imported.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retina.evaluate import load

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from retina.evaluate import load

        return load
    raise AttributeError(f"module 'retina' has no attribute {name!r}")
