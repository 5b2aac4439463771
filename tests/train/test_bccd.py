"""A few training steps on real images; skipped without the images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retina.config_file import load_config
from retina.convert.voc import convert_voc
from retina.train.loop import train

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
BCCD = next(
    (path for path in (ROOT / "data/BCCD_Dataset/BCCD", ROOT.parent / "shared/data/BCCD") if path.is_dir()), None
)


@pytest.mark.skipif(BCCD is None, reason="no BCCD images: neither data/BCCD_Dataset/BCCD nor ../shared/data/BCCD")
def test_a_few_steps_on_blood_cells(tmp_path: Path) -> None:
    assert BCCD is not None
    for split in ("train", "val"):
        tree, notes, _ = convert_voc(BCCD, split)
        assert any("dropped" in note for note in notes)  # the folder has a box without area in each split
        if split == "val":
            tree["images"] = tree["images"][:12]
            kept = {image["id"] for image in tree["images"]}
            tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] in kept]
        (tmp_path / f"{split}.json").write_text(json.dumps(tree))
    flags = [f"data.{s}_{k}={v}" for s in ("train", "val")
             for k, v in (("annotations", tmp_path / f"{s}.json"), ("images", BCCD / "JPEGImages"))]  # fmt: skip
    # A dozen steps from scratch lower the loss, but do not give an AP yet.
    small = ["train.steps=12", "train.log_every=1", "train.warmup_steps=2", "data.short_side=[120]",
             "data.max_side=160", "train.ema=0", "model.channels=32", "model.head_convs=1",
             f"output_dir={tmp_path}/run"]  # fmt: skip
    metrics = train(load_config(ROOT / "configs/bccd.yaml", [*flags, *small]))
    rows = (tmp_path / "run/metrics.csv").read_text().splitlines()[1:]
    losses = [float(row.split(",")[1]) for row in rows]
    assert len(losses) == 12 and losses[-1] < 0.8 * losses[0]
    assert set(metrics["per_class"]) == {"Platelets", "RBC", "WBC"}
