"""Time and memory to open a COCO file of the size of train2017, and the memory of the processes that read its records.

    python benchmarks/coco_file.py [--images 118287] [--boxes 860001] [--folder DIR]

Writes a file with as many images, boxes and polygon points as train2017 has (unless it is there from an earlier run),
and opens it in fresh processes, in turn: `json.loads`, `CocoDataset`, `CocoDataset` as it was before (a list of records
with an array of boxes each, made here from the same data). Then it forks workers that read every record once, and
prints how much memory each of them does not share. Prints milliseconds of `step_keys`, too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from retina.config import Config
from retina.data.coco import CocoDataset, Record
from retina.data.loader import step_keys


def write_file(path: Path, images: int, boxes: int) -> None:
    """Random annotations with polygons; 66 numbers each make the file as large as train2017."""
    rng = random.Random(0)
    with path.open("w") as file:
        file.write('{"info": {}, "images": [')
        for i in range(images):
            entry = {"license": 3, "file_name": f"{i + 1:012}.jpg", "coco_url": f"http://images/{i + 1:012}.jpg",
                     "height": 427 + i % 3, "width": 640, "date_captured": "2013-11-14", "id": i + 1}  # fmt: skip
            file.write((", " if i else "") + json.dumps(entry))
        file.write('], "annotations": [')
        for i in range(boxes):
            x, y, w, h = (
                round(v, 2) for v in (rng.uniform(0, 500), rng.uniform(0, 300), *rng.choices(range(9, 120), k=2))
            )
            polygon = [round(rng.uniform(0, 640), 2) for _ in range(66)]
            entry = {"segmentation": [polygon], "area": round(w * h * 0.7, 4), "iscrowd": int(i % 90 == 0),
                     "image_id": rng.randrange(images) + 1, "bbox": [x, y, w, h],
                     "category_id": i % 80 + 1, "id": i + 1}  # fmt: skip
            file.write((", " if i else "") + json.dumps(entry))
        categories = [{"id": i + 1, "name": f"class {i}"} for i in range(80)]
        file.write(f'], "categories": {json.dumps(categories)}}}')


def open_with(method: str, path: Path) -> None:
    """Open the file in this process and print the seconds and the peak memory in GB."""
    start = time.perf_counter()
    kept: object = json.loads(path.read_bytes()) if method == "json" else CocoDataset(path, path.parent)
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6]))
    del kept


def private_memory() -> float:
    """MB that this process shares with no other."""
    return sum(map(int, re.findall(r"Private_\w+: +(\d+)", Path("/proc/self/smaps_rollup").read_text()))) / 1e3


def read_all(records: Sequence[Record], result: multiprocessing.Queue[float]) -> None:
    before = private_memory()
    for record in records:
        _ = record.boxes.sum() + record.labels.sum()
    result.put(private_memory() - before)


def measure_workers(records: Sequence[Record], workers: int) -> float:
    """Mean MB that a forked process has for itself after it has read every record."""
    context = multiprocessing.get_context("fork")
    result = context.Queue()
    processes = [context.Process(target=read_all, args=(records, result)) for _ in range(workers)]
    for process in processes:
        process.start()
    growth = [result.get() for _ in processes]
    for process in processes:
        process.join()
    return statistics.mean(growth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--boxes", type=int, default=860_001)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--open", nargs=2, metavar=("METHOD", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        open_with(arguments.open[0], Path(arguments.open[1]))
        return
    path = arguments.folder / f"coco_{arguments.images}_{arguments.boxes}.json"
    if not path.exists():
        print(f"writing {path}", flush=True)
        write_file(path, arguments.images, arguments.boxes)
    print(f"{path.stat().st_size / 1e6:.0f} MB, {arguments.images} images, {arguments.boxes} boxes", flush=True)
    seconds: dict[str, list[float]] = {"json": [], "CocoDataset": []}
    for _ in range(arguments.rounds):
        for method, times in seconds.items():
            command = [sys.executable, __file__, "--open", method, str(path)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            elapsed, peak = json.loads(output)
            times.append(elapsed)
            print(f"{method:>12}: {elapsed:6.2f} s, peak {peak:.2f} GB", flush=True)
    ratio = statistics.median(seconds["CocoDataset"]) / statistics.median(seconds["json"])
    print(f"CocoDataset / json.loads: {ratio:.3f} of its time (median)", flush=True)

    dataset = CocoDataset(path, path.parent)
    print(
        f"records: columns, {measure_workers(dataset.records, arguments.workers):.1f} MB private per worker", flush=True
    )
    as_list = list(dataset.records)
    print(f"records: a list,  {measure_workers(as_list, arguments.workers):.1f} MB private per worker", flush=True)
    config = Config()
    step_keys(dataset, config, 0)  # makes the order of the epoch
    start = time.perf_counter()
    for step in range(200):
        step_keys(dataset, config, step)
    print(f"step_keys: {(time.perf_counter() - start) / 200 * 1e3:.3f} ms", flush=True)


if __name__ == "__main__":
    main()
