"""Headings, paragraphs, tables and pictures, as Markdown or as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import re
from dataclasses import dataclass

DPI = 150  # of the pictures


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]
    bold: int | None = None  # the index of a row

    def right(self) -> list[bool]:
        """For each column, whether to align it right: most of its cells are numbers."""
        number = re.compile(r"[-+]?[\d.]+( ± [\d.]+)?")
        columns = [[row[i] for row in self.rows if row[i] not in ("", "-")] for i in range(len(self.head))]
        return [2 * sum(bool(number.fullmatch(text)) for text in texts) > len(texts) for texts in columns]


@dataclass(frozen=True)
class Picture:
    file: str
    alt: str
    png: bytes


Block = Heading | Paragraph | Table | Picture


def to_markdown(blocks: list[Block]) -> str:
    """Markdown text; pictures are links to their files."""
    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"{'#' * level} {_escape_markdown(text)}")
            case Paragraph(text):
                parts.append(_escape_markdown(text))
            case Picture(file, alt):
                parts.append(f"![{_escape_markdown(alt)}]({file})")
            case Table(head, rows, bold):
                lines = [map(_escape_markdown, head), ("---:" if right else "---" for right in block.right())]
                for index, row in enumerate(rows):
                    texts = map(_escape_markdown, row)
                    lines.append((f"**{text}**" if text else "" for text in texts) if index == bold else texts)
                parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


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


def to_html(blocks: list[Block]) -> str:
    """A page with its pictures inside. It has no scripts and loads nothing. The first heading is the title."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"<h{level}>{html.escape(text)}</h{level}>")
            case Paragraph(text):
                parts.append(f"<p>{html.escape(text)}</p>")
            case Picture(_, alt, png):
                width = round(int.from_bytes(png[16:20]) * 100 / DPI)  # so that text has one size in all pictures
                data = base64.b64encode(png).decode()
                parts.append(f'<img width="{width}" alt="{html.escape(alt)}" src="data:image/png;base64,{data}">')
            case Table():
                parts.append(_html_table(block))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _html_table(table: Table) -> str:
    right = table.right()

    def cell(tag: str, text: str, column: int) -> str:
        attribute = ' class="right"' if right[column] else ' class="text"' if len(text) > 60 else ""
        return f"<{tag}{attribute}>{html.escape(text)}</{tag}>"

    lines = ["<thead><tr>" + "".join(cell("th", text, i) for i, text in enumerate(table.head)) + "</tr></thead>"]
    for index, row in enumerate(table.rows):
        opening = '<tr class="best">' if index == table.bold else "<tr>"
        lines.append(opening + "".join(cell("td", text, i) for i, text in enumerate(row)) + "</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"
