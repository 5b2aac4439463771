"""The report of a study at any stage: HTML, Markdown, figures and two CSV tables. Imports no torch.

HTML and Markdown are written from one list of blocks, so their content is the same. Equal inputs give equal bytes.
"""

from __future__ import annotations

import itertools
import math
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from scipy import stats

from retina.analysis.comparison import compare
from retina.analysis.intervals import RESAMPLES
from retina.atomic_files import atomic_file, write_text
from retina.plots.document import Block, Code, Heading, Paragraph, Picture, Table, to_html, to_markdown, to_text
from retina.plural import plural
from retina.study.cells import DEFAULT_OUTPUT, Study, format_value, short_key
from retina.study.csv_tables import group_rows, run_rows, to_csv
from retina.study.figures import plot_ap_curves, plot_classes, plot_heat_map, plot_losses
from retina.study.paper import paper_tables
from retina.study.results import (
    MAIN_METRICS,
    Group,
    Run,
    best_of,
    count_images_and_objects,
    distinct_values,
    group_cells,
    mean,
    number_of_images,
    sd,
    select_for_plots,
    with_ap,
)
from retina.study.verdicts import MIN_AP, Verdicts, without_images


def write_report(study: Study) -> list[Path]:
    """Write report.html, report.md, their figures, results.csv and trainings.csv into the folder of the study.

    The report may be written at any time; open cells are shown as waiting. Returns the files, report.html first.
    """
    groups = group_cells(study)
    verdicts = Verdicts(groups)
    blocks = list(_blocks(study, groups, verdicts))
    study.folder.mkdir(parents=True, exist_ok=True)
    pictures = [block for block in blocks if isinstance(block, Picture)]
    for picture in pictures:
        with atomic_file(study.folder / picture.file) as temporary:
            temporary.write_bytes(picture.data)
    texts = {
        "report.html": to_html(blocks),
        "report.md": to_markdown(blocks),
        "results.csv": to_csv(group_rows(groups, verdicts)),
        "trainings.csv": to_csv(run_rows(study, groups)),
    }
    for name, text in texts.items():
        write_text(study.folder / name, text)
    return [study.folder / name for name in [*texts, *(picture.file for picture in pictures)]]


def terminal_table(study: Study) -> str:
    """The main table as aligned columns of plain text; only AP has a deviation, to keep the lines short."""
    groups = group_cells(study)
    return to_text(_main_table(groups, Verdicts(groups), metrics_with_sd=("AP",)))


def _blocks(study: Study, groups: list[Group], verdicts: Verdicts) -> Iterator[Block]:
    runs_by_key = {run.cell.key: run for group in groups for run in group.runs}
    runs = [runs_by_key[cell.key] for cell in study.cells]
    yield Heading(1, study.name)
    yield Paragraph(_introduction(study, groups, runs))
    again = ["tools/ablate.py", study.file.as_posix(), *study.overrides, "--base", study.base.as_posix()]
    if study.folder.parent != DEFAULT_OUTPUT:
        again += ["--output", study.folder.parent.as_posix()]
    yield Code(f"python {shlex.join(again)}")
    yield Heading(2, "Average precision")
    yield _main_table(groups, verdicts, metrics_with_sd=MAIN_METRICS)
    yield from (Paragraph(text) for text in _significance(groups, verdicts))
    chosen = select_for_plots(groups)
    if chosen:
        if heat_map := plot_heat_map(groups):
            yield heat_map
        yield from plot_ap_curves(groups)
        training_sets = {cell.config.data.train_annotations for cell in study.cells}
        counts = count_images_and_objects(training_sets.pop())[1] if len(training_sets) == 1 else {}
        yield Heading(2, "Classes and losses")
        if len(chosen) < len(with_ap(groups)):
            labels = "; ".join(group.label for group in chosen)
            yield Paragraph(
                f"The figures show the best cell, the worst, and {len(chosen) - 2} evenly spaced by rank between "
                f"them: {labels}."
            )
        yield plot_classes(chosen, counts)
        if picture := plot_losses(chosen):
            yield picture
    if unfinished := [run for run in runs if run.status in ("diverged", "failed")]:
        yield Heading(2, "Diverged and failed")
        yield Table(["run", "reason", "log"], [_failure_row(study, run) for run in unfinished])
    if any((run.result or {}).get("milliseconds") is not None for run in runs):
        yield Heading(2, "Speed")
        yield _speed_table(groups)
    yield Heading(2, "All runs")
    yield Table(
        [*map(short_key, study.keys), "seed", *MAIN_METRICS, "seconds", "folder"], [_run_row(run) for run in runs]
    )


def _introduction(study: Study, groups: list[Group], runs: list[Run]) -> str:
    configs = [cell.config for cell in study.cells]
    varied = "; ".join(f"{key} {', '.join(map(format_value, distinct_values(groups, key)))}" for key in study.keys)
    steps, batch = (
        " or ".join(map(str, sorted({getattr(config.train, name) for config in configs})))
        for name in ("steps", "batch_size")
    )
    images = (
        f"{number_of_images([getattr(config.data, name) for config in configs])} {what} images"
        for name, what in (("train_annotations", "training"), ("val_annotations", "validation"))
    )
    seeds = ", ".join(map(str, sorted({cell.seed for cell in study.cells})))
    statuses = Counter(run.status for run in runs)
    tables = paper_tables()
    paper = "".join(f" The paper's numbers: {tables[name]['title']}." for name in study.paper)
    return (
        f"{study.file.name} varies {varied}. The other settings are those of {study.base.as_posix()}"
        f"{' with ' * bool(study.overrides)}{' '.join(study.overrides)}: {steps} steps of "
        f"{batch} images, {' and '.join(images)}, {'seed' if ',' not in seeds else 'seeds'} {seeds}. "
        f"{statuses['finished'] + statuses['diverged']} of {len(runs)} runs are done; {statuses['diverged']} diverged, "
        f"{statuses['failed']} failed.{paper}"
    )


def _significance(groups: list[Group], verdicts: Verdicts) -> Iterator[str]:
    """The seed noise, and how the order of the cells compares with the paper's, in sentences."""
    measured, noise = with_ap(groups), verdicts.noise
    if noise:
        num_seeds = max(len(group.values()) for group in measured)
        seeds = [without_images(0.0)] * num_seeds
        bound = 100 * compare(seeds, seeds, noise).high[0]
        yield (
            f"Seed noise: the standard deviation over seeds, pooled over {plural(noise.num_groups, 'cell')} with an AP "
            f"of at least {MIN_AP:g} percent, is s = {100 * noise.sd[0]:.2f} percent AP "
            f"({plural(noise.degrees_of_freedom, 'degree')} of freedom). Two means of {num_seeds} seeds must differ by "
            f"more than {bound:.2f} to exceed it (Fisher's least significant difference, "
            "t(0.975) s sqrt(1/n_a + 1/n_b)). Among many cells a few differences exceed "
            "it by chance, most of all those to the best cell, because it was chosen for its high AP."
        )
        best = best_of(groups)
        others = [group for group in measured if group is not best]
        if verdicts.num_images and best and others:
            differences = [verdicts.difference(group, best) for group in others]
            reach = 100 * mean([float(one.high[0] - one.value[0]) for one in differences])
            yield (
                f"Image noise: the {verdicts.num_images} validation images are drawn again {RESAMPLES} times, alike "
                "for all runs. A cell is marked as worse if the 95 % interval of its difference to the best, for other "
                f"seeds and other images, leaves out 0: here if it is more than about {reach:.2f} below."
            )
        elif verdicts.no_images:
            yield f"The noise of the validation images is not included: {verdicts.no_images}."
    elif measured:
        single = all(len(group.values()) == 1 for group in measured)
        reason = "One seed" if single else f"No cell with an AP of at least {MIN_AP:g} has two seeds yet"
        yield f"{reason}: the seed noise is unknown, so no difference is marked."
    matched = [group for group in measured if "AP" in group.paper]
    if len(matched) < 3:
        return
    ours, theirs = [group.mean() for group in matched], [group.paper["AP"] for group in matched]
    tau = float(stats.kendalltau(ours, theirs).statistic)
    if math.isnan(tau):  # all equal
        return
    text = f"Order compared with the paper: Kendall tau {tau:.2f} over {len(matched)} cells (1 same order, -1 reversed)"
    if noise:
        pairs = list(itertools.combinations(matched, 2))
        separate = [(a, b) for a, b in pairs if verdicts.difference(a, b).is_real()]
        agreed = sum((a.mean() - b.mean()) * (a.paper["AP"] - b.paper["AP"]) > 0 for a, b in separate)
        text += f"; {len(separate)} of their {len(pairs)} pairs differ here by more than the noise"
        text += f", {agreed} of these in the same direction as in the paper"
    yield f"{text}."


def _main_table(groups: list[Group], verdicts: Verdicts, metrics_with_sd: Sequence[str]) -> Table:
    """One row per group. `metrics_with_sd`: names of the metrics that are shown with their standard deviation."""
    best = best_of(groups)
    has_paper = any(group.paper for group in groups)
    rows = []
    for group in groups:
        row = [*map(format_value, group.settings.values()), f"{group.count('finished')}/{len(group.runs)}"]
        row += [_format_mean(group.values(name), name in metrics_with_sd) for name in MAIN_METRICS]
        row += [_paper_text(group, "AP")] if has_paper else []
        row.append(f"{group.mean() - best.mean():+.1f}" if best and group is not best and group.values() else "")
        rows.append([*row, _remark(group, best, verdicts)])
    head = [*map(short_key, groups[0].settings), "seeds", *MAIN_METRICS, *["paper AP"] * has_paper, "vs best", ""]
    return Table(head, rows, None if best is None else groups.index(best))


def _remark(group: Group, best: Group | None, verdicts: Verdicts) -> str:
    remarks = []
    if group is best:
        remarks.append("best")
    elif (worse := verdicts.is_worse(group, best)) is not None:
        remarks.append("worse" if worse else "within noise of best")
    total = len(group.runs)
    counts = {status: group.count(status) for status in ("diverged", "failed")}
    remarks += [status if n == total else f"{n} of {total} {status}" for status, n in counts.items() if n]
    if not remarks and not group.values():
        remarks.append("no AP" if group.count("finished") == total else "waiting")  # no objects to find
    return "; ".join(remarks)


def _speed_table(groups: list[Group]) -> Table:
    has_paper = any("ms" in group.paper for group in groups)
    rows = []
    for group in groups:
        times = [run.result["milliseconds"] for run in group.runs if run.result and run.result["milliseconds"]]
        row = [*map(format_value, group.settings.values()), _format_mean(group.values()), _format_mean(times)]
        rows.append(row + [_paper_text(group, "AP"), _paper_text(group, "ms")] * has_paper)
    paper = ["paper AP", "paper ms"] * has_paper
    return Table([*map(short_key, groups[0].settings), "AP", "ms per image", *paper], rows)


def _failure_row(study: Study, run: Run) -> list[str]:
    step = (run.result or {}).get("diverged")
    reason = run.failure or "" if step is None else f"diverged at step {step}"
    log = Path(os.path.relpath(run.cell.folder / "log.txt", study.folder)).as_posix()
    return [run.cell.label, reason, log]


def _run_row(run: Run) -> list[str]:
    numbers = [
        _format_mean([100 * value]) if (value := run.metrics.get(name)) is not None else "" for name in MAIN_METRICS
    ]
    if run.status != "finished":
        numbers[0] = run.status
    seconds = f"{value:.0f}" if (value := (run.result or {}).get("seconds")) is not None else ""
    return [*map(format_value, run.cell.settings.values()), str(run.cell.seed), *numbers, seconds, run.cell.key]


def _format_mean(values: Sequence[float], with_sd: bool = True) -> str:
    """Mean ± sample standard deviation of two or more values."""
    if not values:
        return "-"
    return f"{mean(values):.1f}" + (f" ± {sd(values):.1f}" if with_sd and len(values) > 1 else "")


def _paper_text(group: Group, column: str) -> str:
    value = group.paper.get(column, group.paper.get("text", ""))
    return value if isinstance(value, str) else f"{value:.1f}"
