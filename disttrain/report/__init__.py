"""Run folders turned into one self-contained HTML page. No torch; plotly comes with the extra `report`."""

from disttrain.report.page import Page, build_page, write_page
from disttrain.report.run_files import read_runs

__all__ = ["Page", "build_page", "read_runs", "write_page"]
