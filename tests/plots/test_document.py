"""Blocks of a document as Markdown and as HTML. tests/study tests the tables, tests/check the pictures."""

from __future__ import annotations

import pytest

from retina.plots.document import (
    Beside,
    Block,
    Bullets,
    Code,
    Gallery,
    Heading,
    Paragraph,
    Picture,
    Table,
    to_html,
    to_markdown,
)

PICTURE = Picture("a.jpg", "an <image>", b"\xff\xd8", 80, "a *caption*")


@pytest.mark.parametrize(
    ("block", "markdown", "part_of_html"),
    [
        (Paragraph("a <b>", "Lead:"), "**Lead:** a \\<b\\>", "<p><b>Lead:</b> a &lt;b&gt;</p>"),
        (Bullets(["*x*", "<y>"]), "- \\*x\\*\n- \\<y\\>", "<ul><li>*x*</li><li>&lt;y&gt;</li></ul>"),
        (Code("a: <1>\n  b: `2`"), "    a: <1>\n      b: `2`", "<pre>a: &lt;1&gt;\n  b: `2`</pre>"),
        (Gallery([PICTURE]), "![an \\<image\\>](a.jpg)\n\na \\*caption\\*", '<figure tabindex="0"><img width="80"'),
        (
            Beside([Heading(3, "x", 'a"b')], PICTURE, "#D55E00"),
            "### x\n\n![an \\<image\\>](a.jpg)\n\na \\*caption\\*",
            '<h3 id="a&quot;b">x</h3>\n</div>\n<figure><img width="80" alt="an &lt;image&gt;" src="data:image/jpeg;',
        ),
        (Beside([Paragraph("x")], None, "#D55E00"), "x", "<p>x</p>\n</div>\n</div>"),
        (Table(["h"], [["x"]], links=frozenset("x")), "| h |\n| --- |\n| x |", '<td><a href="#x">x</a></td>'),
    ],
)
def test_blocks(block: Block, markdown: str, part_of_html: str) -> None:
    assert to_markdown([Heading(1, "t"), block]) == f"# t\n\n{markdown}\n"
    assert part_of_html in to_html([Heading(1, "t"), block])


def test_style_of_the_newer_blocks_only_where_they_are() -> None:
    """So that the bytes of the report of a study depend on its own blocks alone."""
    assert ".beside" not in to_html([Heading(1, "t"), Paragraph("x")])
    assert ".beside" in to_html([Heading(1, "t"), Bullets(["x"])])
