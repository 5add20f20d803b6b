"""What a teacher knows, kept for students: its labels of a text, its scores of texts, and what it writes."""

from .label import label
from .score import score_records, scores
from .write import Keep, write

__all__ = ["Keep", "label", "score_records", "scores", "write"]
