"""Generate the data set `shapes` in COCO format: python tools/make_shapes.py --output data/shapes"""

import argparse
import json
from collections import Counter
from pathlib import Path

from retina.shapes import write_shapes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/shapes"), help="folder to write")
    parser.add_argument("--train", type=int, default=1500, help="number of training images")
    parser.add_argument("--val", type=int, default=250, help="number of held-out images")
    parser.add_argument("--size", type=int, default=320, help="side of the square images, pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other images")
    parser.add_argument(
        "--processes", type=int, default=None, help="number of processes that draw; None: one for each core"
    )
    options = vars(parser.parse_args())
    root = options.pop("output")
    try:
        paths = write_shapes(root, **options)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))  # exits with 2

    counts, crowds = {}, {}
    for split, path in paths.items():
        content = json.loads(path.read_text())
        names = {category["id"]: category["name"] for category in content["categories"]}
        objects = [names[a["category_id"]] for a in content["annotations"] if not a["iscrowd"]]
        counts[split], crowds[split] = Counter(objects), len(content["annotations"]) - len(objects)
        empty = len(content["images"]) - len({a["image_id"] for a in content["annotations"]})
        print(f"{path}: {len(content['images'])} images ({empty} of them empty), {len(objects)} objects")
    print(f"\n{'objects':<12}{'train':>8}{'val':>8}")
    for name in names.values():
        print(f"{name:<12}{counts['train'][name]:>8}{counts['val'][name]:>8}")
    print(f"{'(crowds)':<12}{crowds['train']:>8}{crowds['val']:>8}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
