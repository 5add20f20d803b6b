"""Text to batches: sources, streams, tokenizers, token stores, packing; batch n is a function of (seed,
n)."""

from .batches import Batches, ahead, iterate
from .chat import Chat, Preferences
from .chat_template import ChatTemplate
from .prepare import Data, Prepared, prepare
from .records import Records
from .sources import Documents, Jsonl, Parquet, Source, Text, Tfds, source
from .store import TokenStore
from .streams import Clean, Split, Stream, Take, Tokenize
from .tally import Report
from .taught import Taught, TeacherTopK
from .tfds import prepare_tfds
from .tokenizer import Bpe, Byte, Char, File, Grapheme, TokenizerSpec, Unigram, Word
from .tokenizer_json import Tokenizer

__all__ = [
    "Batches",
    "Bpe",
    "Byte",
    "Char",
    "Chat",
    "ChatTemplate",
    "Clean",
    "Data",
    "Documents",
    "File",
    "Grapheme",
    "Jsonl",
    "Parquet",
    "Preferences",
    "Prepared",
    "Records",
    "Report",
    "Source",
    "Split",
    "Stream",
    "Take",
    "Taught",
    "TeacherTopK",
    "Text",
    "Tfds",
    "TokenStore",
    "Tokenize",
    "Tokenizer",
    "TokenizerSpec",
    "Unigram",
    "Word",
    "ahead",
    "iterate",
    "prepare",
    "prepare_tfds",
    "source",
]
