"""Results made readable: intervals, tables, plots, and one HTML page that opens anywhere.

`run_report` and `sweep_report` read the files that a run or a sweep leaves behind and return that page.
"""
