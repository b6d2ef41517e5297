"""Make the page of a run, and the table at its end, from the files of the run folder alone."""

from posttrain.report.build import build_report
from posttrain.report.terminal import summary_table

__all__ = ["build_report", "summary_table"]
