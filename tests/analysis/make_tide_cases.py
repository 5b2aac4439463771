"""Makes tide_cases.json: small data sets, and what the published tool of TIDE says about them.

tidecv 1.0.1 (MIT, github.com/dbolya/tide) needs opencv-python, which replaces the files of opencv-python-headless. So
it is not among the packages of the tests. The file was made in an environment of its own, with numpy 2.4.6 and
pycocotools 2.0.11; tidecv was not changed:

    python -m venv tide && tide/bin/pip install tidecv==1.0.1
    tide/bin/python tests/analysis/make_tide_cases.py

tidecv's recall levels x/100 and those of pycocotools, linspace(0, 1, 101), differ in the last bit, which changes the AP
where a recall is exactly a level between 0 and 1. `check_counts` makes sure that none is.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from tidecv import TIDE, Data  # type: ignore[import-not-found]

OUTPUT = Path(__file__).with_name("tide_cases.json")
SIZE = 400  # of an image, pixels
KINDS = {"Cls": "class", "Loc": "location", "Both": "both", "Dupe": "duplicate", "Bkg": "background", "Miss": "missed"}


def make_case(
    seed: int, objects_of_class: list[int], num_images: int, found: float = 0.8, crowds: int = 0, noise: int = 30
) -> dict[str, Any]:
    """Objects, and detections of them with shifted boxes, wrong classes and duplicates, and `noise` boxes anywhere.

    The last image has neither objects nor detections, the one before it has detections only. Boxes are xywh, scores are
    all different.
    """
    rng = np.random.default_rng(seed)
    num_classes = len(objects_of_class)
    labels = rng.permutation(np.repeat(np.arange(num_classes), objects_of_class))
    objects, detections = [], []
    for label in labels.tolist():
        box = random_box(rng)
        image = int(rng.integers(max(1, num_images - 2)))
        objects.append([image, label, *box, 0])
        for _ in range(int(rng.binomial(3, found / 2))):
            shift = rng.normal(0, rng.choice([0.03, 0.15, 0.3])) * np.array(box[2:])
            moved = [box[0] + shift[0], box[1] - shift[1], *(np.array(box[2:]) * np.exp(rng.normal(0, 0.1, 2)))]
            wrong = int(rng.integers(num_classes)) if rng.random() < 0.2 else label
            detections.append([image, wrong, *moved])
    noisy = range(noise)
    detections += [[int(rng.integers(num_images - 1)), int(rng.integers(num_classes)), *random_box(rng)] for _ in noisy]
    for _ in range(crowds):
        box = [x * 1.5 for x in random_box(rng)]
        image, label = int(rng.integers(num_images - 1)), int(rng.integers(num_classes))
        objects.append([image, label, *box, 1])
        inside = [box[0] + 2, box[1] + 2, box[2] / 2, box[3] / 2]
        detections += [[image, label, *inside], [image, (label + 1) % num_classes, *inside]]
    scores = rng.permutation(np.linspace(0.01, 0.99, len(detections)))
    rows = [[*(round(float(v), 2) for v in row), round(float(s), 5)] for row, s in zip(detections, scores, strict=True)]
    assert len({row[-1] for row in rows}) == len(rows)
    return {
        "num_classes": num_classes,
        "num_images": num_images,
        "objects": [[round(float(v), 2) for v in row] for row in objects],  # image, class, x, y, w, h, crowd
        "detections": rows,  # image, class, x, y, w, h, score
    }


def random_box(rng: np.random.Generator) -> list[float]:
    w, h = rng.uniform(20, 120, 2)
    return [*rng.uniform(0, [SIZE - w, SIZE - h]).tolist(), float(w), float(h)]


def run_tide(case: dict[str, Any]) -> dict[str, Any]:
    """The mean AP at IoU 0.5 in percent, and for each kind of error what TIDE says of it."""
    ground_truth, results = Data("ground truth"), Data("results")
    for label in range(case["num_classes"]):
        ground_truth.add_class(label, str(label))
    for image in range(case["num_images"]):
        ground_truth.add_image(image, str(image))
    for image, label, *box, crowd in case["objects"]:
        add = ground_truth.add_ignore_region if crowd else ground_truth.add_ground_truth
        add(int(image), int(label), box)
    for image, label, *box, score in case["detections"]:
        results.add_detection(int(image), int(label), score, box)
    run = TIDE().evaluate(ground_truth, results, mode=TIDE.BOX)
    lost = run.fix_main_errors()
    kinds = {}
    for error_type, errors in run.error_dict.items():
        fixed = run.fix_errors(lambda error, wanted=error_type: isinstance(error, wanted))
        kinds[KINDS[error_type.short_name]] = {
            "lost": float(lost[error_type]),
            "fixed_ap": [float(fixed.objs[label].get_ap()) for label in range(case["num_classes"])],
            "ids": sorted(error.get_id() for error in errors),  # positions in detections; of missed ones in objects
        }
    check_counts(case, kinds["missed"]["ids"])
    ap = [float(run.ap_data.objs[label].get_ap()) for label in range(case["num_classes"])]
    return {"map": float(run.ap), "ap": ap, "kinds": kinds}


def check_counts(case: dict[str, Any], missed: list[int]) -> None:
    """The number of objects of a class shares no factor with 100, also without the missed ones."""
    for label in range(case["num_classes"]):
        rows = {row for row, (_, of_class, *_, crowd) in enumerate(case["objects"]) if of_class == label and not crowd}
        for count in (len(rows), len(rows - set(missed))):
            assert count <= 1 or math.gcd(count, 100) == 1, f"{count} objects of class {label}: choose another seed"


def main() -> None:
    cases = {
        "mixed": make_case(16, [23, 31, 17, 13], 12),
        "crowds": make_case(3, [19, 29, 11], 10, crowds=9),
        "more than 100 detections in an image": make_case(5, [53, 41], 3, noise=190),
        "few found": make_case(2, [7, 11, 13], 20, found=0.15, noise=8),
        "one class": make_case(5, [37], 8),
    }
    lines = [f'"{name}": {json.dumps({**case, "tide": run_tide(case)})}' for name, case in cases.items()]
    OUTPUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
