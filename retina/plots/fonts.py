"""Fonts for names in any script. DejaVu Sans comes with matplotlib; for letters that it lacks, an installed font."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import findSystemFonts, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from PIL import ImageFont

DEJAVU_SANS = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")


def load_font(size: int, text: str) -> ImageFont.FreeTypeFont:
    """A font with the letters of `text`, `size` in pixels."""
    return _open(_file_of(frozenset(text)), size)


def use_fonts(figure: Figure) -> None:
    """Give each text of a figure whose letters DejaVu Sans lacks a font that has them."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        file = _file_of(frozenset(text.get_text()))
        if file != DEJAVU_SANS:
            text.set_fontfamily(["DejaVu Sans", _family(file)])


@cache
def _file_of(text: frozenset[str]) -> str:
    """The file of DejaVu Sans, or of the installed font that has the most of the letters that it lacks."""
    wanted = frozenset(ord(letter) for letter in text if letter.isprintable() and letter != " ")
    missing = wanted - _letters(DEJAVU_SANS)[0]
    if not missing:
        return DEJAVU_SANS

    def value(file: str) -> tuple[int, int, bool]:
        letters, is_regular = _letters(file)
        return len(missing & letters), len(wanted & letters), is_regular

    files = sorted(findSystemFonts(), key=lambda file: (len(Path(file).stem), file))  # Sans before Serif
    best = max([DEJAVU_SANS, *files], key=value)
    if lacking := "".join(map(chr, sorted(wanted - _letters(best)[0]))):
        warnings.warn(
            f"no installed font has all letters of a name; {lacking} are drawn as boxes; install one that has them, "
            "for example Noto Sans CJK (Debian and Ubuntu: apt install fonts-noto-cjk)",
            stacklevel=2,
        )
    return best


@cache
def _open(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


@cache
def _family(file: str) -> str:
    """The name by which matplotlib finds the font, which it may not have listed yet."""
    fontManager.addfont(file)
    return FT2Font(file).family_name


@cache
def _letters(file: str) -> tuple[frozenset[int], bool]:
    """The code points of a font, none for a file that is no font with outlines; and whether its style is Regular."""
    if "LastResort" in file:  # of macOS: boxes for every letter
        return frozenset(), False
    try:
        font = FT2Font(file)
        return frozenset(font.get_charmap()), font.style_name == "Regular"
    except (RuntimeError, OSError):
        return frozenset(), False
