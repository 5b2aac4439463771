"""A grid of runs as a resumable study: its file, cells, trial storage, loop and report.

Imports no torch and nothing of the detector: each run is a process of tools/train.py. `retina.study.loop` and
`retina.study.report` are imported by name, because they import Optuna and matplotlib.
"""

from retina.study.cells import DEFAULT_OUTPUT, Cell, Study, StudyError
from retina.study.study_file import load_study

__all__ = ["DEFAULT_OUTPUT", "Cell", "Study", "StudyError", "load_study"]
