"""Convert one split of a Pascal VOC or YOLO data set to a COCO annotation file.

python tools/convert.py voc VOC_ROOT --split train --output FILE [--categories a b c]
python tools/convert.py yolo YOLO_ROOT [--split train] --output FILE [--categories a b c]

retina/convert/voc.py and yolo.py describe what is read, dropped and refused. An existing file is replaced only if this
command wrote it.
"""

import argparse
import json
import logging
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import TextIO

from retina.atomic_files import write_text
from retina.command_line import file_path
from retina.convert import convert_voc, convert_yolo
from retina.convert.checks import CONVERTED


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    formats = parser.add_subparsers(dest="format", required=True)
    voc = formats.add_parser("voc", help="Pascal VOC: XML files")
    voc.add_argument("root", type=file_path, metavar="VOC_ROOT", help="contains Annotations/, ImageSets/, JPEGImages/")
    voc.add_argument("--split", required=True, help="the name of a list: ImageSets/Main/<split>.txt")
    voc.add_argument("--categories", nargs="+", metavar="NAME", help="classes to keep, in the order of their ids")
    yolo = formats.add_parser("yolo", help="YOLO: a text file of labels for each image")
    yolo.add_argument(
        "root", type=file_path, metavar="YOLO_ROOT", help="a data.yaml, or a folder with images and labels"
    )
    yolo.add_argument("--split", help="train, val or test of data.yaml; or a folder such as images/<split>")
    yolo.add_argument(
        "--categories", nargs="+", metavar="NAME", help="names of the classes 0, 1, ..., if no file has them"
    )
    for subparser in (voc, yolo):
        subparser.add_argument("--output", required=True, type=file_path, metavar="FILE", help="COCO JSON to write")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs about damaged images has no file name
    output: Path = arguments.output
    convert = {"voc": convert_voc, "yolo": convert_yolo}[arguments.format]
    try:
        refuse_foreign_file(output)
        coco, notes, images = convert(arguments.root, arguments.split, arguments.categories)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json.dumps(coco, allow_nan=False))
    except (OSError, ValueError) as error:
        show(f"convert {arguments.format}: {error}", sys.stderr)
        return 2

    for note in notes:
        show(note)
    counts = Counter(annotation["category_id"] for annotation in coco["annotations"])
    for category in coco["categories"]:
        show(f"{category['name']:>20} {counts[category['id']]:7d}")
    difficult = sum(annotation["iscrowd"] for annotation in coco["annotations"])
    boxes = f"{len(coco['annotations'])} boxes" + (f" ({difficult} difficult)" if difficult else "")
    show(f"{output}: {len(coco['images'])} images, {boxes}, {len(coco['categories'])} classes")
    use = "val" if (arguments.split or "").startswith(("val", "test")) else "train"
    show(f"To use it: {shlex.quote(f'data.{use}_annotations={output}')} {shlex.quote(f'data.{use}_images={images}')}")
    return 0


def refuse_foreign_file(output: Path) -> None:
    """Raises ValueError for an existing file that this command did not write: it may be an input."""
    if not output.exists():
        return
    try:
        description = json.loads(output.read_bytes())["info"]["description"]
        written_here = CONVERTED in description
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        written_here = False
    if not written_here:
        raise ValueError(f"--output: {output} exists and is not a file that this command wrote; give another name")


def show(text: str, stream: TextIO | None = None) -> None:
    """Print a line. Names in data may have characters that the terminal cannot show, or that control it."""
    stream = stream or sys.stdout
    text = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


if __name__ == "__main__":
    sys.exit(main())
