"""Make the page of a run, and the table at its end, from the files of the run folder alone."""

from posttrain.report.build import build
from posttrain.report.terminal import summary_table

__all__ = ["build", "summary_table"]
