"""Convert one split of a Pascal VOC folder to a COCO annotation file.

python tools/convert_voc.py VOC_ROOT --split train --output FILE [--categories a b c]

retina/convert/voc.py describes what happens to corners, difficult objects and categories.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from retina.atomic_files import write_text
from retina.convert import convert_voc


def main() -> int:
    parser = argparse.ArgumentParser(description="Convert one split of a Pascal VOC folder to COCO JSON.")
    parser.add_argument("root", type=Path, metavar="VOC_ROOT", help="contains Annotations/, ImageSets/, JPEGImages/")
    parser.add_argument("--split", required=True, help="the name of a list: ImageSets/Main/<split>.txt")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="COCO JSON to write")
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="classes to keep, in the order of their ids")
    arguments = parser.parse_args()
    output: Path = arguments.output
    try:
        coco, notes = convert_voc(arguments.root, arguments.split, arguments.categories)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json.dumps(coco, allow_nan=False))
    except (OSError, ValueError) as error:
        print(f"convert_voc: {error}", file=sys.stderr)
        return 2

    for note in notes:
        print(note)
    counts = Counter(annotation["category_id"] for annotation in coco["annotations"])
    for category in coco["categories"]:
        print(f"{category['name']:>20} {counts[category['id']]:7d}")
    difficult = sum(annotation["iscrowd"] for annotation in coco["annotations"])
    boxes = f"{len(coco['annotations'])} boxes" + (f" ({difficult} difficult)" if difficult else "")
    print(f"{output}: {len(coco['images'])} images, {boxes}, {len(coco['categories'])} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
