"""Images per second of the training loader on JPEG files of COCO's size, by stage and compared with three others.

    python benchmarks/loader.py [--images 128] [--workers N] [--rounds 3] [--batch 16] [--short-side 800]

Makes JPEG files of 640x480 at quality 90 that are as large as COCO's, with seven boxes each, in a temporary folder.
Then it measures in rounds, in turn:

- a batch made in this process, on one core, and where its time goes;
- `--workers` processes: from the files to batches in this process, and on the card if there is one.

Processor time shows the images per second of one core, also on a machine with other work.

The others do the operations of a well-known loader, written here from its documentation, in torch's DataLoader:

- torchvision, as in its detection reference: PIL, v2.PILToTensor, flip, v2.Resize with antialiasing, float32
- detectron2, as in its DatasetMapper: PIL, flip, bilinear resize by PIL, uint8 (3, H, W)
- mmdetection, as in its default pipeline: OpenCV for reading, resize and flip, uint8 (3, H, W)

They hand over a list of images, which they pad on the card. retina hands over a padded batch. Files come from memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from retina.config import Config, Data, Train
from retina.data import loader
from retina.data.batch import Batch
from retina.data.coco import CocoDataset, Record
from retina.data.loader import train_batches

WIDTH, HEIGHT, BOXES = 640, 480, 7
Sample = tuple[Any, Any]


def make_images(folder: Path, count: int) -> tuple[CocoDataset, float]:
    """Write JPEG files and their annotations; returns them and the mean size of a file in KB."""
    rng = np.random.default_rng(0)
    tree: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    total = 0
    for i in range(count):
        boxes = [
            [*rng.uniform((0, 0), (WIDTH - w, HEIGHT - h)), w, h] for w, h in np.exp(rng.uniform(3, 5.5, (BOXES, 2)))
        ]
        path = folder / f"{i:06}.jpg"
        Image.fromarray(photograph(rng, boxes)).save(path, quality=90)
        total += path.stat().st_size
        tree["images"].append({"id": i + 1, "file_name": path.name, "width": WIDTH, "height": HEIGHT})
        for box in boxes:
            annotation = {"id": len(tree["annotations"]) + 1, "image_id": i + 1, "category_id": 1, "iscrowd": 0}
            tree["annotations"].append(annotation | {"bbox": box, "area": box[2] * box[3]})
    (folder / "a.json").write_text(json.dumps(tree))
    return CocoDataset(folder / "a.json", folder), total / count / 1e3


def photograph(rng: np.random.Generator, boxes: list[list[float]]) -> NDArray[np.uint8]:
    """Noise whose amplitude falls with the frequency, as in photographs; smoother colors; objects with edges; grain."""

    def noise(height: int, width: int, power: float) -> NDArray[np.float32]:
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
        frequency[0, 0] = np.inf
        field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency**power, (height, width))
        return (field / field.std()).astype(np.float32)

    colors = np.stack([noise(HEIGHT // 4, WIDTH // 4, 1.5) for _ in range(3)], axis=2)
    image = 120 + 18 * cv2.resize(colors, (WIDTH, HEIGHT)) + 45 * noise(HEIGHT, WIDTH, 1.15)[..., None]
    for x, y, w, h in boxes:
        inside = np.zeros((HEIGHT, WIDTH), np.uint8)
        cv2.ellipse(inside, (int(x + w / 2), int(y + h / 2)), (int(w / 2), int(h / 2)), 0, 0, 360, 1, -1)
        image[inside > 0] = 0.6 * image[inside > 0] + rng.uniform(0, 110, 3)
    return (image + rng.normal(0, 4.5, (HEIGHT, WIDTH, 1))).clip(0, 255).astype(np.uint8)


def boxes_of(record: Record, scale: float, width: int, flip: bool) -> Tensor:
    boxes = record.boxes * scale
    if flip:
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    return torch.as_tensor(boxes)


def torchvision_sample(record: Record, short_side: int, max_side: int) -> Sample:
    image = Image.open(record.path).convert("RGB")
    boxes = tv_tensors.BoundingBoxes(record.boxes, format="XYXY", canvas_size=(image.height, image.width))  # type: ignore[call-overload]
    sample: Sample = _torchvision_transform(short_side, max_side)(image, {"boxes": boxes})
    return sample


_transforms: dict[tuple[int, int], v2.Compose] = {}


def _torchvision_transform(short_side: int, max_side: int) -> v2.Compose:
    if (short_side, max_side) not in _transforms:  # built once in a process
        resize = v2.Resize((short_side,), max_size=max_side, antialias=True)
        steps = [v2.PILToTensor(), v2.RandomHorizontalFlip(0.5), resize, v2.ToDtype(torch.float32, scale=True)]
        _transforms[short_side, max_side] = v2.Compose(steps)
    return _transforms[short_side, max_side]


def _flip_and_scale(width: int, height: int, short_side: int, max_side: int) -> tuple[bool, float]:
    return bool(np.random.default_rng().random() < 0.5), min(
        short_side / min(width, height), max_side / max(width, height)
    )


def detectron2_sample(record: Record, short_side: int, max_side: int) -> Sample:
    image = np.asarray(Image.open(record.path).convert("RGB"))
    height, width = image.shape[:2]
    flip, scale = _flip_and_scale(width, height, short_side, max_side)
    size = int(width * scale + 0.5), int(height * scale + 0.5)
    image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    if flip:
        image = np.flip(image, axis=1)
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1))), boxes_of(record, scale, size[0], flip)


def mmdetection_sample(record: Record, short_side: int, max_side: int) -> Sample:
    image = cv2.imdecode(np.frombuffer(record.path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    height, width = image.shape[:2]
    flip, scale = _flip_and_scale(width, height, short_side, max_side)
    size = int(width * scale + 0.5), int(height * scale + 0.5)
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    if flip:
        image = cv2.flip(image, 1)
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), boxes_of(record, scale, size[0], flip)


PEERS = {"torchvision": torchvision_sample, "detectron2": detectron2_sample, "mmdetection": mmdetection_sample}


class PeerDataset(Dataset[Sample]):
    def __init__(self, dataset: CocoDataset, make: Callable[[Record, int, int], Sample], config: Data) -> None:
        self.dataset, self.make, self.config = dataset, make, config

    def __getitem__(self, index: int) -> Sample:
        record = self.dataset.records[index % len(self.dataset.records)]
        return self.make(record, self.config.short_side[0], self.config.max_side)


def _one_thread(worker: int = 0) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def batches(name: str, dataset: CocoDataset, config: Config) -> Iterator[Any]:
    """Batches of retina or of a peer, `train.steps` of them, from `data.workers` processes."""
    if name == "retina":
        return (batch for (batch,) in train_batches(dataset, config, 0))
    size = config.train.batch_size
    indices = [list(range(step * size, (step + 1) * size)) for step in range(config.train.steps)]
    return iter(
        DataLoader(
            PeerDataset(dataset, PEERS[name], config.data),
            batch_sampler=indices,
            num_workers=config.data.workers,
            collate_fn=_as_lists,
            worker_init_fn=_one_thread,
            pin_memory=torch.cuda.is_available(),
        )
    )


def _as_lists(samples: list[Sample]) -> list[list[Any]]:
    return [list(part) for part in zip(*samples, strict=True)]


def images_per_second(name: str, dataset: CocoDataset, config: Config, warmup: int) -> tuple[float, float]:
    """By the clock, from the end of `warmup` batches to the last one; and per second of processor time.

    Processor time is that of all processes, with their start; without workers that from the end of `warmup`. Other work
    on the machine changes it less than the clock. The images of each batch are on the card, if there is one, before the
    next batch is asked for.
    """
    cuda, processor = torch.cuda.is_available(), sum(os.times()[:4])
    start = in_process = 0.0
    for step, batch in enumerate(batches(name, dataset, config)):
        if isinstance(batch, Batch) and cuda:
            batch.to(torch.device("cuda"))
        elif cuda:
            [image.cuda(non_blocking=True) for image in batch[0]]
        if cuda:
            torch.cuda.synchronize()
        if step == warmup - 1:
            start = time.perf_counter()
            in_process = time.process_time()
    in_process = time.process_time() - in_process
    elapsed = time.perf_counter() - start
    del batch
    size, steps = config.train.batch_size, config.train.steps
    if not config.data.workers:
        return (steps - warmup) * size / elapsed, (steps - warmup) * size / in_process
    return (steps - warmup) * size / elapsed, steps * size / (sum(os.times()[:4]) - processor)


@contextmanager
def timed(owner: Any, name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Add the processor time of all calls of a function to `seconds[name]`."""
    function = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] = seconds.get(name, 0) + time.process_time() - start

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        setattr(owner, name, function)


def stages(dataset: CocoDataset, config: Config) -> dict[str, float]:
    """Milliseconds of processor time per image for each stage, in this process, without the first batch."""
    images = (config.train.steps - 1) * config.train.batch_size
    start = time.process_time()
    for i in range(images):
        dataset.records[i % len(dataset.records)].path.read_bytes()
    read = time.process_time() - start
    t: dict[str, float] = {}
    with timed(loader, "read_image", t), timed(loader, "train_transform", t), timed(cv2, "resize", t):
        for step, _ in enumerate(batches("retina", dataset, config)):
            if step == 0:
                t.clear()
                start = time.process_time()
        total = time.process_time() - start
    result = {"read": read, "decode": t["read_image"] - read, "resize": t["resize"]}
    result |= {"augment": t["train_transform"] - t["resize"]}
    result |= {"collate": total - t["read_image"] - t["train_transform"], "total": total}
    return {name: seconds / images * 1e3 for name, seconds in result.items()}


def copy_to_card(dataset: CocoDataset, config: Config) -> float:
    """Milliseconds per image from pinned memory to the card."""
    batch = next(batches("retina", dataset, config))
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        batch.to(torch.device("cuda"))
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) / config.train.batch_size * 1e3


def print_rates(title: str, rates: dict[str, list[float]]) -> None:
    print(f"\n{title}; median of the rounds (lowest to highest), and retina's ratio by rounds")
    for name, values in rates.items():
        ratios = sorted(ours / theirs for ours, theirs in zip(rates["retina"], values, strict=True))
        print(
            f"  {name:12} {statistics.median(values):7.1f} ({min(values):.1f} to {max(values):.1f})"
            f"   {statistics.median(ratios):5.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    for option, default in (("images", 128), ("workers", cores), ("rounds", 3), ("batch", 16), ("short-side", 800)):
        parser.add_argument(f"--{option}", type=int, default=default)
    arguments = parser.parse_args()
    _one_thread()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no card"
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, opencv {cv2.__version__}, pillow "
          f"{PIL.__version__}, {cores} cores, {card}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        dataset, kilobytes = make_images(Path(folder), arguments.images)
        print(f"{arguments.images} files of {WIDTH}x{HEIGHT}, {kilobytes:.0f} KB on average; short side "
              f"{arguments.short_side}, batch {arguments.batch}", flush=True)  # fmt: skip
        data = Data(train_annotations=f"{folder}/a.json", train_images=folder, short_side=(arguments.short_side,))

        def config(workers: int, steps: int) -> Config:
            train = Train(batch_size=arguments.batch, steps=steps)
            return Config(data=data.model_copy(update={"workers": workers}), train=train)

        measure(dataset, config, arguments.workers, arguments.rounds)


def measure(dataset: CocoDataset, config: Callable[[int, int], Config], workers: int, rounds: int) -> None:
    """Measure in rounds, and print the tables."""
    names = ["retina", *PEERS]
    one_core: dict[str, list[float]] = {name: [] for name in names}
    together: dict[str, list[float]] = {name: [] for name in names}
    a_core: dict[str, list[float]] = {name: [] for name in names}
    times = []
    for _ in range(rounds):
        times.append(stages(dataset, config(0, 3)))
        for name in names:
            one_core[name].append(images_per_second(name, dataset, config(0, 3), warmup=1)[1])
        for name in names:
            steps = 10 * workers
            rate, core_rate = images_per_second(name, dataset, config(workers, steps), warmup=3 * workers)
            together[name].append(rate)
            a_core[name].append(core_rate)
    print("\nretina on one core, milliseconds of processor time per image: median of the rounds (lowest to highest)")
    for stage in times[0]:
        values = [t[stage] for t in times]
        print(f"  {stage:12} {statistics.median(values):7.2f} ({min(values):.2f} to {max(values):.2f})")
    if torch.cuda.is_available():
        print(f"  {'to the card':12} {copy_to_card(dataset, config(0, 1)):7.2f}")
    print_rates("A batch in this process: images per second of processor time", one_core)
    place = "this process and the card" if torch.cuda.is_available() else "this process"
    print_rates(f"{workers} worker processes, to {place}: images per second of processor time of all processes", a_core)
    print_rates(f"{workers} worker processes, to {place}: images per second", together)


if __name__ == "__main__":
    main()
