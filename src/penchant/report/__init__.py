"""Run directories told to people: one self-contained HTML page and a model card for each, and runs side by side."""

from penchant.report.card import write_model_card
from penchant.report.compare import as_markdown, compare, print_comparison, to_json, write_comparison
from penchant.report.page import write_report

__all__ = [
    "as_markdown",
    "compare",
    "print_comparison",
    "to_json",
    "write_comparison",
    "write_model_card",
    "write_report",
]
