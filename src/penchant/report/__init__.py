"""A run directory told to people: one self-contained HTML page and a model card."""

from penchant.report.card import write_model_card
from penchant.report.page import write_report

__all__ = ["write_model_card", "write_report"]
