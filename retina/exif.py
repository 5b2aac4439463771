"""The EXIF tag that rotates or mirrors an image. Nothing else of the EXIF data is used, because it may be damaged."""

from __future__ import annotations

from typing import Any

from PIL import Image

ORIENTATION = 0x0112  # the tag
SWAPS_SIDES = (5, 6, 7, 8)  # its values that exchange width and height
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def exif_orientation(image: Image.Image) -> int:
    """1 to 8; 1 without the tag. In a PNG file the tag may come after the pixels, so load them before."""
    try:
        value: Any = Image.Image.getexif(image).get(ORIENTATION)  # that of the PNG class decodes the pixels
        return int(value) if value in range(1, 9) else 1
    except Exception:  # damaged EXIF data raises almost anything
        return 1


def upright(image: Image.Image) -> Image.Image:
    """The image rotated and mirrored as its tag says."""
    orientation = exif_orientation(image)
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image
