"""A demonstration of the losses on imbalanced classification: data sets, experiment, tables and figure.

Of retina it uses only `losses` and the styles of `plots`: nothing of the detector belongs here, and the detector does
not import it. scikit-learn makes and splits the data sets; it is imported only then.
"""

from retina.classify_demo.experiment import STEPS, Result, run_experiment
from retina.classify_demo.figure import draw_figure
from retina.classify_demo.problems import Problem, make_problems
from retina.classify_demo.summary import conclusions, describe, format_table

__all__ = [
    "STEPS",
    "Problem",
    "Result",
    "conclusions",
    "describe",
    "draw_figure",
    "format_table",
    "make_problems",
    "run_experiment",
]
