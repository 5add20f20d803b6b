"""Results made readable: intervals, tables, plots, and one HTML page that opens anywhere.

`run_report` and `sweep_report` read the files that a run or a sweep leaves behind and return that page.
"""

from lmx.report.runs import read_metrics, run_report
from lmx.report.sweeps import sweep_report

__all__ = ["read_metrics", "run_report", "sweep_report"]
