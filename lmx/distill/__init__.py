"""What a teacher knows, kept for students: its labels of a text, its scores of texts, and what it writes."""

from .label import label

__all__ = ["label"]
