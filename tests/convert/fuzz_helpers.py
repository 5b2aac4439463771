"""Changes of files: of any bytes, of the text of XML, YAML and label files, and of pictures."""

from __future__ import annotations

import io
import random
import re

from PIL import Image

FOLDER, PIPE, LOOP = "folder", "pipe", "loop"  # instead of a file: also a link to itself
Files = dict[str, bytes | str]  # path -> content, or one of the three

ODD_NUMBERS = [
    "nan", "-inf", "1e999", "1e308", "-1e308", "1e-320", "0", "-0", "-1", "1", "2", "0.5", "1.0000001", "1.02",
    "9" * 500, "0x10", "1_0", "1,5", "\u0661", "true", "null", "[1]", "", " ", "12abc", "\0", "24", "25", "300",
]  # fmt: skip
ODD_TEXTS = [
    "", "no", "~", "../..", "/", "/etc", ".", "a" * 5000, "a/" * 3000, "\0", "\ud800", "\x1b[2J", "\u202e", "x\\y",
    "[]", "{}", "[[a]]", "{a: {b: c}}", "&a [*a]", "*a", "!!python/object:os.system x", "!!binary x", "? ", "- - -",
    "'", '"\\x41\\u0000"', '"\\U99999999"', "|", "%YAML 9", "2001-01-01", "1:2:3", "%s{0}", "<!DOCTYPE x>",
    "<![CDATA[x]]>", "&amp;&#0;", "&#x110000;", "<x", "<?x?>", "<object>", "</object>",
]  # fmt: skip
ENCODINGS = ["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "cp1252", "utf-7", "shift_jis", "cp037"]
TOKENS = {
    "xml": r"</?\w+>|[^<>]+",
    "yaml": r"[\w./]+|[^\w./]+",
    "txt": r"[^ \r\n]+|[ \r\n]+",
}


FORMATS = {
    "jpg": "JPEG", "png": "PNG", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP", "ppm": "PPM", "tga": "TGA",
    "pcx": "PCX", "ico": "ICO", "jp2": "JPEG2000",
}  # fmt: skip


def images_of_all_formats() -> dict[str, bytes]:
    """Suffix -> a picture of 24 x 16 pixels. The JPEG is to be rotated by 90 degrees."""
    pictures = {}
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix, name in FORMATS.items():
        stream = io.BytesIO()
        settings = {"exif": exif} if name in ("JPEG", "PNG", "WEBP", "TIFF") else {}
        Image.radial_gradient("L").resize((24, 16)).convert("RGB").save(stream, name, **settings)
        pictures[suffix] = stream.getvalue()
    return pictures


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Random bytes, cut, inserted, repeated, removed or replaced; or all of the content in another encoding."""
    start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    noise = rng.randbytes(rng.choice([1, 2, 4, 30]))
    action = rng.randrange(9)
    if action == 0:
        return noise
    if action == 1:
        return content[:start]
    if action == 2:
        return content[:start] + noise + content[start:]
    if action == 3:
        return content[:end] + content[start:]
    if action == 4:
        return content[:start] + content[end:]
    if action == 5:
        return content[:start] + noise + content[start + len(noise) :]
    if action == 6:
        return b""
    if action == 7:
        return content.decode("latin-1").encode(rng.choice(ENCODINGS), "replace")
    return content * rng.choice([2, 50])


def mutate_text(content: bytes, suffix: str, rng: random.Random) -> bytes:
    """Changes of tokens: tags and values of XML, keys and values of YAML, columns of a label file."""
    tokens = re.findall(TOKENS.get(suffix, TOKENS["txt"]), content.decode("utf-8", "replace"))
    for _ in range(rng.choice([1, 1, 2, 3])):
        place, other = (rng.randrange(len(tokens) or 1) for _ in range(2))
        action = rng.randrange(6)
        if not tokens or action == 0:
            tokens.insert(place, rng.choice(ODD_TEXTS))
        elif action == 1:
            tokens[place] = rng.choice(ODD_NUMBERS if tokens[place].strip()[:1].isdigit() else ODD_TEXTS)
        elif action == 2:
            numbers = [i for i, token in enumerate(tokens) if token.strip()[:1].isdigit()] or [place]
            tokens[rng.choice(numbers)] = rng.choice(ODD_NUMBERS)
        elif action == 3:
            del tokens[place]
        elif action == 4:
            tokens.insert(other, tokens[place])
        else:
            tokens[place], tokens[other] = tokens[other], tokens[place]
    return "".join(tokens).encode("utf-8", "surrogatepass")


def mutate_image(content: bytes, rng: random.Random) -> bytes:
    """Bytes of the header changed, or the file cut."""
    changed = bytearray(content)
    for _ in range(rng.choice([0, 1, 1, 3, 10])):
        place = rng.randrange(min(len(changed), rng.choice([30, 200])))
        changed[place] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    return bytes(changed[: rng.randrange(len(changed))] if rng.random() < 0.3 else changed)
