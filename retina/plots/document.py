"""Headings, paragraphs, tables and pictures, as Markdown or as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from PIL import Image

from retina.plots.fonts import use_fonts

DPI = 150  # of the figures


@dataclass(frozen=True)
class Heading:
    level: int
    text: str
    id: str = ""  # that a table links to


@dataclass(frozen=True)
class Paragraph:
    text: str
    lead: str = ""  # bold, before the text


@dataclass(frozen=True)
class Bullets:
    texts: list[str]


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    text: str


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]
    bold: int | None = None  # the index of a row
    links: frozenset[str] = frozenset()  # cells that link to the heading with their text as its id

    def right(self) -> list[bool]:
        """For each column, whether to align it right: most of its cells are numbers."""
        number = re.compile(r"[-+]?[\d.]+( ± [\d.]+)?")
        columns = [[row[i] for row in self.rows if row[i] not in ("", "-")] for i in range(len(self.head))]
        return [2 * sum(bool(number.fullmatch(text)) for text in texts) > len(texts) for texts in columns]


@dataclass(frozen=True)
class Link:
    text: str
    target: str  # a URL, may be relative to the page


@dataclass(frozen=True)
class Picture:
    file: str
    alt: str
    data: bytes  # PNG or JPEG
    width: int  # in the page, CSS pixels
    caption: str = ""
    link: Link | None = None  # before the caption


@dataclass(frozen=True)
class Gallery:
    """Pictures in rows. A click on one enlarges it."""

    pictures: list[Picture]


@dataclass(frozen=True)
class Beside:
    """Blocks with a picture at their right, or below them where the page is narrow, and a line in `color` at the left.

    Without a picture the blocks take the whole width.
    """

    blocks: Sequence[Heading | Paragraph | Bullets]
    picture: Picture | None
    color: str  # "#RRGGBB"


Block = Heading | Paragraph | Bullets | Code | Table | Picture | Gallery | Beside


def figure_picture(figure: Figure, file: str, alt: str) -> Picture:
    """A figure as PNG; text has one size in all figures of a page."""
    buffer = io.BytesIO()
    use_fonts(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that no font has; a layout too narrow for its names
        figure.savefig(buffer, format="png", dpi=DPI)
    png = buffer.getvalue()
    return Picture(file, alt, png, round(int.from_bytes(png[16:20]) * 100 / DPI))


def photo(image: Image.Image, alt: str, width: int, caption: str = "", link: Link | None = None) -> Picture:
    """An image as JPEG, with the colors of thin lines in full."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85, subsampling=0, optimize=True)
    return Picture("", alt, buffer.getvalue(), width, caption, link)


def to_text(table: Table) -> str:
    """A table as aligned columns of plain text, for a terminal."""
    lines = [table.head, *table.rows]
    aligned = [
        (max(map(len, column)), right) for column, right in zip(zip(*lines, strict=True), table.right(), strict=True)
    ]
    return "\n".join(
        "  ".join(text.rjust(w) if right else text.ljust(w) for text, (w, right) in zip(line, aligned, strict=True))
        .rstrip()
        for line in lines
    )  # fmt: skip


def to_markdown(blocks: Sequence[Block]) -> str:
    """Markdown text; pictures are links to their files."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_escape_markdown(text)}"
        case Paragraph(text, lead):
            return (f"**{_escape_markdown(lead)}** " if lead else "") + _escape_markdown(text)
        case Bullets(texts):
            return "\n".join(f"- {_escape_markdown(text)}" for text in texts)
        case Code(text):
            return "\n".join(f"    {line}" for line in text.splitlines())
        case Picture(file, alt, caption=caption, link=link):
            below = [f"[{_escape_markdown(link.text)}]({link.target})"] if link else []
            below += [_escape_markdown(caption)] if caption else []
            return f"![{_escape_markdown(alt)}]({file})" + (f"\n\n{' '.join(below)}" if below else "")
        case Gallery(pictures):
            return "\n\n".join(map(_markdown, pictures))
        case Beside(inner, picture):
            return "\n\n".join(map(_markdown, [*inner, *([picture] if picture else [])]))
        case Table(head, rows, bold):
            lines = [list(map(_escape_markdown, head)), ["---:" if right else "---" for right in block.right()]]
            for index, row in enumerate(rows):
                cells = list(map(_escape_markdown, row))
                lines.append([f"**{cell}**" if cell else "" for cell in cells] if index == bold else cells)
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape_markdown(text: str) -> str:
    """Escape what Markdown would interpret, also in a cell of a table; white space becomes single spaces."""
    return re.sub(r"([\\`*<>|&\[\]~]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1100px; margin: 0 auto;
  padding: 1rem; overflow-wrap: anywhere; }
h1, h2 { line-height: 1.2; margin: 2rem 0 0.8rem; }
h1 { margin-top: 0.5rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 0.25rem 0.8rem; text-align: left; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th { border-bottom: 2px solid #888; }
td.text { white-space: normal; min-width: 16rem; }
.right { text-align: right; }
.best td { font-weight: bold; background: #eef6f2; }
img { max-width: 100%; height: auto; display: block; margin: 1.2rem 0; }
"""


BLOCKS_STYLE = """
h2 { border-top: 1px solid #e4e4e4; padding-top: 1.2rem; }
h3 { font-size: 1.05rem; line-height: 1.3; margin: 0 0 0.5rem; }
p, ul { margin: 0.5rem 0; }
ul { padding-left: 1.2rem; font-size: 0.9rem; white-space: pre-line; }
pre { background: #f5f5f5; border: 1px solid #e4e4e4; padding: 0.6rem 0.9rem; font-size: 0.9rem;
  white-space: pre-wrap; }
figure { margin: 0; }
body > figure { margin: 1.2rem 0; }
figure img { margin: 0; }
figcaption { font-size: 0.8rem; line-height: 1.35; color: #444; margin-top: 0.25rem; }
.beside { display: flex; flex-wrap: wrap; gap: 0.5rem 1.5rem; align-items: flex-start; margin: 1.2rem 0;
  padding: 0.2rem 0 0.2rem 1rem; border-left: 5px solid; }
.beside > div { flex: 1 1 24rem; min-width: 0; }
.beside > figure { flex: 0 1 26rem; }
.beside img { max-height: 20rem; width: auto; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; margin: 1rem 0; }
.gallery figure { cursor: zoom-in; outline: none; }
.gallery img { width: 100%; }
.gallery figure:focus { grid-column: 1 / -1; cursor: default; }
.gallery figure:focus img { width: auto; }
@media print {
  html { font-size: 10.5px; }
  body { max-width: none; font-size: 1rem; padding: 0; }
  .wide { overflow: visible; }
  th, td { white-space: normal; padding: 0.2rem 0.5rem; }
  h2, h3 { break-after: avoid; }
  figure, img, pre, tr, .beside { break-inside: avoid; }
  .beside { flex-wrap: nowrap; }
  .beside > div { flex-basis: 50%; }
  .gallery { grid-template-columns: repeat(4, 1fr); gap: 0.5rem; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""  # only in pages that have such blocks


def to_html(blocks: Sequence[Block]) -> str:
    """A page with its pictures inside. It has no scripts and loads nothing. The first heading is the title."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    style = STYLE + (
        BLOCKS_STYLE if any(isinstance(block, Gallery | Beside | Code | Bullets) for block in blocks) else ""
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        + "\n".join(map(_html, blocks))
        + "\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(level, text, name):
            attribute = f' id="{html.escape(name)}"' if name else ""
            return f"<h{level}{attribute}>{html.escape(text)}</h{level}>"
        case Paragraph(text, lead):
            return "<p>" + (f"<b>{html.escape(lead)}</b> " if lead else "") + f"{html.escape(text)}</p>"
        case Bullets(texts):
            return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts) + "</ul>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Picture(caption=caption, link=link):
            return f"<figure>{_html_figure(block)}</figure>" if caption or link else _html_picture(block)
        case Gallery(pictures):
            figures = "\n".join(f'<figure tabindex="0">{_html_figure(picture)}</figure>' for picture in pictures)
            return f'<div class="gallery">\n{figures}\n</div>'
        case Beside(inner, picture, color):
            left = "\n".join(map(_html, inner))
            right = f"<figure>{_html_figure(picture)}</figure>\n" if picture else ""
            return f'<div class="beside" style="border-color: {color}">\n<div>\n{left}\n</div>\n{right}</div>'
        case Table():
            return _html_table(block)


def _html_picture(picture: Picture) -> str:
    kind = "png" if picture.data.startswith(b"\x89PNG") else "jpeg"
    data = base64.b64encode(picture.data).decode()
    return f'<img width="{picture.width}" alt="{html.escape(picture.alt)}" src="data:image/{kind};base64,{data}">'


def _html_figure(picture: Picture) -> str:
    link = picture.link
    before = f'<a href="{html.escape(link.target)}">{html.escape(link.text)}</a> ' if link else ""
    return _html_picture(picture) + f"<figcaption>{before}{html.escape(picture.caption)}</figcaption>"


def _html_table(table: Table) -> str:
    right = table.right()

    def cell(tag: str, text: str, column: int) -> str:
        attribute = ' class="right"' if right[column] else ' class="text"' if len(text) > 60 else ""
        content = html.escape(text)
        if text in table.links:
            content = f'<a href="#{content}">{content}</a>'
        return f"<{tag}{attribute}>{content}</{tag}>"

    lines = ["<thead><tr>" + "".join(cell("th", text, i) for i, text in enumerate(table.head)) + "</tr></thead>"]
    for index, row in enumerate(table.rows):
        opening = '<tr class="best">' if index == table.bold else "<tr>"
        lines.append(opening + "".join(cell("td", text, i) for i, text in enumerate(row)) + "</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"
