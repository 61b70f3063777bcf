"""Run folders into one page: curves, samples, settings; solvers compared."""

from jaxpost.reports._page import write_report
from jaxpost.reports._pairs import write_pairs
from jaxpost.reports._profiles import (
    Profile,
    draw_convergence,
    draw_profiles,
    performance_profile,
)
from jaxpost.reports._run import ReportError, Run, read_run, read_runs
from jaxpost.reports._tables import summary_table
from jaxpost.reports._watermark import ShownToken, TokenKind, write_watermark_page

__all__ = [
    "Profile",
    "ReportError",
    "Run",
    "ShownToken",
    "TokenKind",
    "draw_convergence",
    "draw_profiles",
    "performance_profile",
    "read_run",
    "read_runs",
    "summary_table",
    "write_pairs",
    "write_report",
    "write_watermark_page",
]
