"""Which differences between the groups of a study are real: the statistics of tools/compare.py.

The seed noise is pooled over all groups, because three seeds are too few to estimate it for each. The images of the
validation set are drawn again if every run still has its detections. Otherwise the seeds count alone.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np

from retina.analysis.comparison import Difference, SeedNoise, compare, seed_noise
from retina.analysis.intervals import Sampled, bootstrap_weights, resample_ap
from retina.analysis.matches import match_detections
from retina.analysis.results_file import ResultsError, read_results
from retina.data.annotations import Annotations, DataError, read_annotations
from retina.study.results import Group, Run, with_ap

MIN_AP = 1.0  # percent AP; cells below vary little with the seed, and would make the noise of the others look small


class Verdicts:
    """Compares the groups of a study.

    Attributes:
        noise: of the seeds, from the groups with at least MIN_AP and two seeds; None if there is no such group.
        num_images: of the validation set, where the images are drawn again; None where the seeds count alone.
        no_images: why the seeds count alone, "" where they do not.
    """

    def __init__(self, groups: list[Group]) -> None:
        measured = with_ap(groups)
        runs = [run for group in measured for run in group.runs if run.metrics.get("AP") is not None]
        sampled = [_resampled(run) for run in runs]
        reasons = [one for one in sampled if isinstance(one, str)]
        if len({run.cell.config.data.val_annotations for run in runs}) > 1:
            reasons.insert(0, "the runs have different validation images")
        self.no_images = reasons[0] if reasons else ""
        self._sampled = {
            run.cell.key: without_images(run.metrics["AP"]) if reasons or isinstance(one, str) else one
            for run, one in zip(runs, sampled, strict=True)
        }
        self.num_images = next(iter(self._sampled.values())).num_images if runs and not reasons else None
        self.noise: SeedNoise | None = seed_noise([self._of(group) for group in measured if group.mean() >= MIN_AP])

    def difference(self, a: Group, b: Group) -> Difference:
        """B minus A; the only column is AP."""
        return compare(self._of(a), self._of(b), self.noise)

    def is_worse(self, group: Group, best: Group | None) -> bool | None:
        """Whether the difference to the best exceeds the noise; None if that is unknown."""
        if group is best or best is None or self.noise is None or not group.values() or group.count("diverged"):
            return None
        low = self.difference(group, best).low[0]
        return None if math.isnan(low) else bool(low > 0)

    def _of(self, group: Group) -> list[Sampled]:
        return [self._sampled[run.cell.key] for run in group.runs if run.cell.key in self._sampled]


def without_images(ap: float) -> Sampled:
    """A run whose images are not drawn again."""
    return Sampled(np.array([ap]), np.full((2, 1), ap), 2, np.array([2]))


def _resampled(run: Run) -> Sampled | str:
    """AP for other images, or why it is not known: the detections that gave the AP of the run are not there."""
    file = run.cell.folder / "detections.json"
    if not file.is_file():
        return f"{file.parent.name}/{file.name} is missing"
    sampled = _resampled_file(file, file.stat().st_mtime_ns, Path(run.cell.config.data.val_annotations))
    if isinstance(sampled, Sampled) and sampled.numbers[0] != run.metrics["AP"]:
        given, expected = (f"{100 * ap:.2f}" for ap in (sampled.numbers[0], run.metrics["AP"]))
        return (
            f"{file.parent.name}/{file.name} gives an AP of {given} and not the {expected} of the run: it is of "
            "another evaluation, or images could not be read"
        )
    return sampled


@cache  # the report and the table in the terminal ask for the same
def _resampled_file(file: Path, _: int, annotations: Path) -> Sampled | str:
    try:
        truth = _read_annotations(annotations)
        matches = match_detections(truth, read_results(file, truth))
        return resample_ap(matches, bootstrap_weights(len(truth.image_ids)))
    except (DataError, ResultsError) as error:
        return str(error)


@cache  # reading the annotations of COCO takes seconds
def _read_annotations(path: Path) -> Annotations:
    return read_annotations(path)
