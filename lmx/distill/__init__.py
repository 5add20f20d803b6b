"""What a teacher knows, kept for students: its labels of a text, its scores of texts, and what it writes."""

from .label import label
from .score import score_records, scores

__all__ = ["label", "score_records", "scores"]
