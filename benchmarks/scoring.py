"""The time and memory of COCO's numbers at the size of val2017, by this project's scorers and others.

    python benchmarks/scoring.py [--images 5000] [--classes 80] [--detections 500000] [--resamples 1000] ...

Each part runs in a process of its own, which reads the files first. Prints the wall and the CPU seconds of the part,
the memory that it adds to the process, and whether its numbers equal those of pycocotools in every digit.
faster-coco-eval is measured if it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from retina.analysis.accumulate import accumulate
from retina.analysis.comparison import compare
from retina.analysis.intervals import bootstrap_weights, resample, resample_ap
from retina.analysis.matches import match_detections
from retina.analysis.results_file import read_results, results_columns
from retina.analysis.scoring import score, score_with_pycocotools
from retina.config import COCO_METRICS
from retina.data.annotations import read_annotations

SIDE = 640  # pixels


def write_files(folder: Path, arguments: argparse.Namespace) -> None:
    """Objects of classes of unequal frequency; three detections near each, the rest of nothing with lower scores."""
    rng = np.random.default_rng(0)
    shares = 1 / (np.arange(arguments.classes) + 2.0)
    shares /= shares.sum()

    def boxes(count: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        sizes = np.exp(rng.normal(4, 1, (count, 2))).clip(4, 400)
        return np.concatenate([rng.random((count, 2)) * (SIDE - sizes), sizes], axis=1)

    images, labels = (
        rng.integers(1, arguments.images + 1, arguments.objects),
        rng.choice(arguments.classes, arguments.objects, p=shares),
    )
    objects = boxes(arguments.objects).round(2)
    annotations = [
        {"id": i + 1, "image_id": int(images[i]), "category_id": int(labels[i]) + 1, "bbox": objects[i].tolist(),
         "area": float(objects[i, 2] * objects[i, 3] * rng.uniform(0.4, 1)), "iscrowd": int(rng.random() < 0.01)}
        for i in range(arguments.objects)
    ]  # fmt: skip
    truth = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": SIDE, "height": SIDE} for i in range(1, arguments.images + 1)
        ],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, arguments.classes + 1)],
        "annotations": annotations,
    }
    (folder / "annotations.json").write_text(json.dumps(truth))
    near = min(3 * arguments.objects, arguments.detections)
    source, rest = np.arange(near) % arguments.objects, arguments.detections - near
    for number in range(2):
        shift = rng.normal(0, 0.1 + 0.02 * number, (near, 4))
        moved = objects[source].copy()
        moved[:, :2] += shift[:, :2] * moved[:, 2:]
        moved[:, 2:] *= np.exp(shift[:, 2:])
        found = np.concatenate([moved, boxes(rest)]).round(3)
        scores = np.concatenate([rng.beta(3, 3, near), rng.beta(1, 8, rest)]).astype(np.float32)
        of_image = np.concatenate([images[source], rng.integers(1, arguments.images + 1, rest)])
        of_class = np.concatenate([labels[source], rng.choice(arguments.classes, rest, p=shares)]) + 1
        order = np.lexsort((-scores, of_image))
        columns = (of_image[order].tolist(), of_class[order].tolist(), found[order].tolist(), scores[order].tolist())
        results = [
            {"image_id": image, "category_id": label, "bbox": box, "score": value}
            for image, label, box, value in zip(*columns, strict=True)
        ]
        (folder / f"detections{number}.json").write_text(json.dumps(results))


def by_faster_coco_eval(folder: Path, results: list[dict[str, Any]]) -> list[float]:
    from faster_coco_eval import COCO, COCOeval_faster

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "annotations.json"))
        evaluation = COCOeval_faster(truth, truth.loadRes(results), "bbox", print_function=lambda *_: None)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats[:12]]


def measure(name: str, folder: Path, resamples: int, queue: Any) -> None:
    """Run one part, and put its seconds, memory and numbers into the queue."""
    annotations = read_annotations(folder / "annotations.json")
    columns = read_results(folder / "detections0.json", annotations)
    needs_list = name in ("score", "faster-coco-eval")
    entries = json.loads((folder / "detections0.json").read_text()) if needs_list else []
    weights = bootstrap_weights(len(annotations.image_ids), resamples)
    matches = match_detections(annotations, columns) if name in ("accumulate", "bootstrap", "bootstrap of AP") else None
    runs = []
    if name == "compare two runs":
        runs = [
            match_detections(annotations, read_results(folder / f"detections{i}.json", annotations)) for i in (0, 1)
        ]
        runs = [resample(run, weights) for run in runs]
    parts: dict[str, Callable[[], Any]] = {
        "read detections.json": lambda: read_results(folder / "detections0.json", annotations),
        "score": lambda: score(annotations, results_columns(entries, annotations)).metrics,
        "pycocotools": lambda: score_with_pycocotools(annotations, columns).metrics,
        "faster-coco-eval": lambda: dict(zip(COCO_METRICS, by_faster_coco_eval(folder, entries), strict=True)),
        "match": lambda: match_detections(annotations, columns),
        "accumulate": lambda: accumulate(matches).metrics if matches else None,
        "bootstrap": lambda: resample(matches, weights) if matches else None,
        "bootstrap of AP": lambda: resample_ap(matches, weights) if matches else None,
        "compare two runs": lambda: compare(runs[:1], runs[1:], None),
    }
    before, wall, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), time.process_time()
    result = parts[name]()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    numbers = [result[key] for key in COCO_METRICS] if isinstance(result, dict) else None
    queue.put((wall, cpu, added, numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 5000), ("classes", 80), ("objects", 36_781), ("detections", 500_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--resamples", type=int, default=1000)
    arguments = parser.parse_args()
    names = ["read detections.json", "score", "faster-coco-eval", "pycocotools", "match", "accumulate",
             "bootstrap of AP", "bootstrap", "compare two runs"]  # fmt: skip
    if importlib.util.find_spec("faster_coco_eval") is None:
        names.remove("faster-coco-eval")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary:
        write_files(Path(temporary), arguments)
        print(f"{'':<22}{'wall s':>9}{'CPU s':>9}{'MiB':>8}", flush=True)
        numbers = {}
        for name in names:
            queue = context.Queue()
            process = context.Process(target=measure, args=(name, Path(temporary), arguments.resamples, queue))
            process.start()
            wall, cpu, added, numbers[name] = queue.get()
            process.join()
            print(f"{name:<22}{wall:9.2f}{cpu:9.2f}{added:8.0f}", flush=True)
    for name in ("score", "faster-coco-eval", "accumulate"):
        if name in numbers:
            equal = [a == b for a, b in zip(numbers[name], numbers["pycocotools"], strict=True)]
            print(f"{name}: {sum(equal)} of 12 numbers equal those of pycocotools in every digit")


if __name__ == "__main__":
    main()
