"""Names in letters that DejaVu Sans lacks, with a font that is made here and has two of them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from retina.plots import fonts
from retina.plots.boxes import draw_boxes
from retina.plots.fonts import load_font, use_fonts
from retina.plots.run import plot_precision_recall

LETTERS = "a.猫犬"


def make_font(file: Path, letters: str, style: str = "Regular") -> None:
    """Each letter is a rectangle of its own height."""
    names = [".notdef", *(f"letter{i}" for i in range(len(letters)))]
    glyphs = {}
    for place, name in enumerate(names):
        pen, top = TTGlyphPen(None), 200 + 150 * place
        pen.moveTo((50, 0))
        for corner in ((50, top), (450, top), (450, 0)):
            pen.lineTo(corner)
        pen.closePath()
        glyphs[name] = pen.glyph()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(letter): f"letter{i}" for i, letter in enumerate(letters)})
    font.setupGlyf(glyphs)
    font.setupHorizontalMetrics(dict.fromkeys(names, (500, 50)))
    font.setupHorizontalHeader(ascent=900, descent=-200)
    font.setupNameTable({"familyName": "Two Animals", "styleName": style})
    font.setupOS2()
    font.setupPost()
    font.save(file)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The only installed font, in two styles, beside a file that is none."""
    (tmp_path / "a.ttf").write_bytes(b"damaged")
    make_font(tmp_path / "animals.ttf", LETTERS)
    make_font(tmp_path / "b.ttf", LETTERS, "Bold")
    files = [str(tmp_path / name) for name in ("a.ttf", "b.ttf", "animals.ttf")]
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: files)
    fonts._file_of.cache_clear()
    yield files
    fonts._file_of.cache_clear()


def box_of(name: str) -> np.ndarray:
    return np.asarray(draw_boxes(Image.new("RGB", (200, 100)), [[10, 40, 190, 90]], [name], colors=["#FFFFFF"]))


def figure_of(name: str) -> np.ndarray:
    figure = Figure(figsize=(2, 2), dpi=50)
    axes = figure.add_subplot()
    axes.barh([0], [1])
    axes.set_yticks([0], [name])
    use_fonts(figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def test_letters_that_dejavu_lacks_are_drawn_with_an_installed_font(installed: list[str]) -> None:
    for picture in (box_of, figure_of):
        assert not np.array_equal(picture("猫"), picture("犬")), "boxes for both would be equal"
    curves = plot_precision_recall({"猫": [1.0, 0.5, 0.0]})
    (name,) = [text for text in curves.findobj(Text) if isinstance(text, Text) and text.get_text() == "猫"]
    assert len(name.get_fontfamily()) == 2, "DejaVu Sans alone would draw a box"
    assert Path(load_font(20, "猫").path).name == "animals.ttf"
    assert Path(load_font(20, "Straße, мост").path).name == "DejaVuSans.ttf"
    with pytest.warns(UserWarning, match="; 039 are drawn"):  # the letters count more than the digits of the score
        assert Path(load_font(20, "猫 0.93").path).name == "animals.ttf"


def test_letters_that_no_font_has_are_named(installed: list[str]) -> None:
    with pytest.warns(UserWarning, match="no installed font has all .*; 鳥 are drawn .* apt install fonts-noto-cjk"):
        font = load_font(20, "猫鳥")
    assert Path(font.path).name == "animals.ttf", "it has one of the two"
    installed.clear()
    with pytest.warns(UserWarning, match="; 猫 are drawn"):
        assert Path(load_font(20, "猫").path).name == "DejaVuSans.ttf"
