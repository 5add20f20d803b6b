"""The front door: a tour of the house in chapters, each of which reads what the ones before it found.

A chapter is a file with `CHAPTER = Chapter(name, title, run, show)`. To add one, write it and name it in CHAPTERS.
"""

from lmx.quickstart import answers, evaluate, fewer, pretrain, released, sample, text, tokens
from lmx.quickstart.tour import Chapter, Options, Tour, take

CHAPTERS: tuple[Chapter, ...] = (
    text.CHAPTER,
    tokens.CHAPTER,
    pretrain.CHAPTER,
    evaluate.CHAPTER,
    sample.CHAPTER,
    released.CHAPTER,
    fewer.CHAPTER,
    answers.CHAPTER,
)

__all__ = ["CHAPTERS", "Chapter", "Options", "Tour", "take"]
