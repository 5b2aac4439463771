"""Numbers with a noun, as text."""

from __future__ import annotations


def plural(number: int, noun: str) -> str:
    """1 image, 2 images, 1,000 classes: `noun` is singular, and its plural ends in s."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"
