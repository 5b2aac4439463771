"""Results in words: a table for each problem, and sentences that follow from the numbers alone."""

from __future__ import annotations

import math

from retina.classify_demo.experiment import RAREST, Scores, Values
from retina.classify_demo.problems import TRAIN_SIZE, Problem, split

SIGNS = {f"recall of {RAREST}": 1, f"precision of {RAREST}": 1, "macro F1": 1, "ECE": -1}  # -1: less is better
NO_DIFFERENCE = "no difference beyond the noise"


def describe(problem: Problem) -> str:
    """The title, and how many examples are for training and for the test."""
    _, test_indices = split(problem, 0)
    is_rarest = problem.labels == problem.num_classes - 1
    in_test = int(is_rarest[test_indices].sum())
    in_train = int(is_rarest.sum()) - in_test
    return f"{problem.title}: {TRAIN_SIZE} to train ({in_train} of {RAREST}), {len(test_indices)} to test ({in_test})"


def format_table(scores: Scores) -> str:
    """Mean ± standard deviation over the seeds, in Markdown."""
    rows = [["", *scores]]
    metrics = next(iter(scores.values()))
    rows += [[metric, *(format_values(values[metric]) for values in scores.values())] for metric in metrics]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def format_values(values: Values) -> str:
    """Mean ± standard deviation; of one seed the value alone."""
    return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" if len(values) > 1 else f"{values.mean():.3f}"


def difference(a: Values, b: Values) -> tuple[float, bool]:
    """Mean of a minus mean of b, and whether it is larger than the pooled standard deviation over the seeds."""
    gap = float(a.mean() - b.mean())
    if len(a) < 2 or len(b) < 2:
        return gap, False  # the noise is unknown
    return gap, abs(gap) > math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)


def conclusions(scores_by_title: dict[str, Scores]) -> list[str]:
    """Sentences about all problems: the best loss for each metric, then pairs of losses."""
    scores_of_any_loss = next(iter(next(iter(scores_by_title.values())).values()))
    lines = ["A difference counts when it is larger than the pooled standard deviation of the seeds."]
    if len(scores_of_any_loss["ECE"]) < 2:
        lines = ["With one seed the noise is unknown, so no difference counts; use --seeds 2 or more."]
    for title, scores in scores_by_title.items():
        for metric in (f"recall of {RAREST}", "macro F1", "ECE"):
            values = {name: metrics[metric] for name, metrics in scores.items()}
            lines.append(best_sentence(f"{title[0]}, {metric}", values, SIGNS[metric]))
    pairs = [("focal", "CE"), ("weighted CE", "CE"), ("weighted focal", "weighted CE")]
    return lines + [pair_sentence(one, other, scores_by_title) for one, other in pairs]


def best_sentence(subject: str, values: dict[str, Values], sign: int = 1) -> str:
    """Which loss is best, and which others differ from it by no more than the noise. `sign` -1: less is better."""
    best, *others = sorted(values, key=lambda name: -sign * float(values[name].mean()))
    ties = [name for name in others if not difference(values[best], values[name])[1]]
    if ties == others:
        return f"{subject}: {NO_DIFFERENCE} between the losses; {best} has {format_values(values[best])}."
    return f"{subject}: {best} is best ({format_values(values[best])})" + (
        f"; {', '.join(ties)}: {NO_DIFFERENCE}." if ties else "."
    )


def pair_sentence(one: str, other: str, scores_by_title: dict[str, Scores]) -> str:
    """In which metrics, on which problems, the first loss is better or worse than the other."""
    by_verdict: dict[str, list[str]] = {"Better": [], "Worse": [], NO_DIFFERENCE.capitalize(): []}
    for metric, sign in SIGNS.items():
        comparisons: dict[str, list[str]] = {}
        for title, scores in scores_by_title.items():
            a, b = scores[one][metric], scores[other][metric]
            gap, is_significant = difference(a, b)
            verdict = ("Better" if sign * gap > 0 else "Worse") if is_significant else NO_DIFFERENCE.capitalize()
            comparisons.setdefault(verdict, []).append(f"{title[0]} {a.mean():.3f} against {b.mean():.3f}")
        for verdict, texts in comparisons.items():
            by_verdict[verdict].append(f"{metric} ({', '.join(texts)})")
    sentences = [f"{verdict}: {'; '.join(texts) or 'nothing'}." for verdict, texts in by_verdict.items()]
    return f"{one} against {other}. " + " ".join(sentences)
