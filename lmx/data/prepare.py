"""From sources to batches: a tokenizer and token stores, made once and kept in a cache under the hash of their origin.

A changed file, setting or tokenizer gives another hash, so nothing old is ever taken for new.

  cache/tokenizers/<hash>/   tokenizer.json
  cache/stores/<hash>/       one token store for each source and part
  cache/parts/<hash>/        stores of some of a source's files: what is done of a source that is not finished

Every folder appears whole or not at all, and carries its artifact file. Two processes that need the same folder
take turns: the second finds it made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from lmx import artifact

from . import files, released
from .batches import Batches
from .chat_template import PLAIN, ChatTemplate
from .pack import windows
from .sources import Document, NoDocument, Source, source, texts_of
from .store import TokenStore, Writer, explained, publish
from .streams import Clean, Split, Stream, Tokenize
from .tally import Report
from .taught import Taught, TeacherTopK
from .tokenizer import Byte, File, TokenizerSpec
from .tokenizer_json import Tokenizer

VERSION = 1
GROUP_BYTES = 256 << 20
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Data:
    """What is trained and validated on, and how it becomes batches.

    train, valid: sources, or their names as `source` reads them. Without `valid`, `valid_share` of the
    training documents is held out, whole, by a hash of their text (see Split); a source that is one single
    text is held out by position, at its end. valid_share=0 trains without validation.
    weights: share of the rows drawn from each training source; () goes through all of them once an epoch.
    tokenizer: trained on the training part alone. clean: Unicode to NFC, control characters out (see Clean).
    seq_len, batch_size, packing: see Batches. teacher: labels that a teacher made of the training part.

    Conversations (see Chat) go through the template that comes with the tokenizer, or PLAIN where there is none, and
    replies alone are trained on and validated. Pairs of them (see Preferences) too.
    """

    train: tuple[Source | str, ...] = ()
    valid: tuple[Source | str, ...] = ()
    valid_share: float = 0.05
    weights: tuple[float, ...] = ()
    tokenizer: TokenizerSpec = Byte()
    seq_len: int = 256
    batch_size: int = 32
    packing: str = "best_fit"
    clean: bool = True
    teacher: TeacherTopK | None = None

    def __post_init__(self):
        for name in ("train", "valid"):
            if isinstance(getattr(self, name), str | Source):
                raise ValueError(
                    f"Data: {name}={getattr(self, name)!r:.99} is one source; write a tuple: ({name}_source,)"
                )
        if not 0.0 <= self.valid_share < 1.0:
            raise ValueError(f"Data: valid_share={self.valid_share}; use a share from 0 up to, but not, 1")
        if self.weights and len(self.weights) != len(self.train):
            raise ValueError(
                f"Data: {len(self.weights)} weights for {len(self.train)} training sources; give one each"
            )
        for name in ("seq_len", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"Data: {name}={getattr(self, name)} must be at least 1")
        if self.packing not in ("best_fit", "concat"):
            raise ValueError(f"Data: packing={self.packing!r}; use 'best_fit' or 'concat'")
        scored = {isinstance(one, Source) and one.scored for one in (*self.train, *self.valid)}
        if len(scored) > 1:
            raise ValueError("Data: some sources have scores and some have none; use those of one kind")
        for one in (*self.train, *self.valid):
            if self.packing == "concat" and isinstance(one, Source) and one.masked:
                raise ValueError(
                    f"Data: packing='concat' would cut replies from their prompts; use 'best_fit' with {one.label}"
                )

    def documents(self, part: str, report: Report | None = None) -> Iterator[Document]:
        """The documents of "train" or "valid" as they are tokenized: cleaned, split, in order."""
        if part not in ("train", "valid"):
            raise ValueError(f"Data: part={part!r}; use 'train' or 'valid'")
        report = report if report is not None else Report()
        for one in _parts(self)[part == "valid"]:
            yield from one.documents(report)


@dataclass(frozen=True)
class Prepared:
    """Data made ready: the tokenizer, the stores of both parts, and what was counted while they were made.

    beside: name -> text of what came with the tokenizer, the template of conversations among it if there are any.
    """

    data: Data
    seed: int
    tokenizer: Tokenizer
    tokenizer_path: Path
    train_stores: tuple[TokenStore, ...]
    valid_stores: tuple[TokenStore, ...]
    report: Report
    beside: dict[str, str] = field(default_factory=dict)
    taught: tuple[Taught, ...] = ()

    @cached_property
    def train(self) -> Batches:
        """Endless shuffled batches; batch n is a function of the seed and n."""
        d = self.data
        return Batches(
            self.train_stores, d.seq_len, d.batch_size, self.seed, d.weights, d.packing, taught=self.taught
        )

    @cached_property
    def valid(self) -> Batches:
        """Validation rows in stored order, best-fit packed always; `valid.once()` gives each once.

        Raises: ValueError if the data have no validation part.
        """
        if not self.valid_stores:
            raise ValueError(
                "Data: valid_share=0 and no valid sources: nothing to validate on; set one of them"
            )
        return Batches(self.valid_stores, self.data.seq_len, self.data.batch_size, shuffle=False)

    @property
    def made_from(self) -> tuple[Path, ...]:
        """The folders to name as parents of what is made from these data."""
        stores = (*self.train_stores, *self.valid_stores, *self.taught)
        return (self.tokenizer_path, *(Path(store.path) for store in stores))


def prepare(data: Data, cache: str | Path, seed: int = 0, progress: Progress | None = None) -> Prepared:
    """Makes the tokenizer and stores that `data` needs, or finds them in `cache`.

    Args:
      seed: of the training batches; nothing in the cache depends on it.
      progress: called as progress(stage, bytes of text done, bytes of files in all or None if compressed).
    Raises: ValueError when no document is usable or none is held out, and as the sources do;
      FileNotFoundError; OSError that names the folder and the way out when the disk is full or may not be
      written. What was finished before an error is kept and found the next time.
    """
    cache = Path(cache).expanduser()
    if not data.train:
        raise ValueError(
            "Data: train is empty; name at least one source, for example train=('corpus/*.txt',)"
        )
    files.load_hashes(cache / "hashes.json")
    train_parts, valid_parts = _parts(data)
    progress = progress or (lambda stage, done, total: None)
    report = Report()
    tokenizer, tokenizer_path = _tokenizer(data.tokenizer, train_parts, cache, report, progress)
    beside = data.tokenizer.beside()
    tokenize = Tokenize(tokenizer.ending_with(released.end_ids(beside, tokenizer_path)))
    if any(part.source.conversations for part in (*train_parts, *valid_parts)):
        chat, beside = _template(tokenizer, beside, tokenizer_path, report)
        tokenize = replace(tokenize, chat=chat)
    stores = []
    for name, parts in (("train", train_parts), ("valid", valid_parts)):
        stores.append([])
        for i, part in enumerate(parts):
            stage = f"{name} {i + 1}/{len(parts)}"
            store = _store(part, tokenize, tokenizer_path, cache, stage, progress)
            if store.mask is not None:
                _count_cut(part.source, store, data.seq_len, report)
            if not (name == "valid" and part.split):
                report.add(Report.from_json(store.meta["report"]))
            if name == "train" and not len(store):
                raise ValueError(
                    f"{part.source.label}: valid_share={data.valid_share} leaves no document to train on"
                )
            stores[-1].append(store)
    valid = tuple(store for store in stores[1] if len(store))
    if valid_parts and not valid:
        n = sum(map(len, stores[0]))
        raise ValueError(
            f"Data: valid_share={data.valid_share} of {n:,} documents holds out none; raise it, name "
            "validation sources with valid=(...), or train without validation with valid_share=0"
        )
    with contextlib.suppress(OSError):
        files.save_hashes(cache / "hashes.json")
    made = tuple(stores[0])
    taught = (
        tuple(data.teacher.opened(store, data.seq_len, data.packing) for store in made)
        if data.teacher
        else ()
    )
    return Prepared(data, seed, tokenize.tokenizer, tokenizer_path, made, valid, report, beside, taught)


@dataclass(frozen=True)
class _Part:
    """The documents of a source that belong to one part of the data."""

    source: Source
    split: Split | None
    clean: bool

    def documents(self, report: Report) -> Iterator[Document]:
        documents = self.source.documents(report)
        documents = (Clean() if self.clean else Stream())(documents, report)
        return (self.split or Stream())(documents, report)

    def store_key(self, tokenize: Tokenize) -> str:
        """Names the store of their tokens."""
        if not self.source.conversations:
            return self.key(tokenize.tokenizer.hash)
        return self.key(tokenize.tokenizer.hash, str(tokenize.tokenizer.end_ids), tokenize.chat.fingerprint)

    def key(self, *more: str) -> str:
        """Names the documents, and whatever `more` is made of them, by content."""
        return _key(self.source.fingerprint(), repr(self.split), str(self.clean), *more)


def _parts(data: Data) -> tuple[list[_Part], list[_Part]]:
    """(training parts, validation parts)."""
    train, valid = [], [_Part(source(spec), None, data.clean) for spec in data.valid]
    for src in map(source, data.train):
        if data.valid or not data.valid_share:
            train.append(_Part(src, None, data.clean))
        elif (halves := src.holdout(data.valid_share)) is not None:
            train.append(_Part(halves[0], None, data.clean))
            valid.append(_Part(halves[1], None, data.clean))
        else:
            train.append(_Part(src, Split("train", data.valid_share), data.clean))
            valid.append(_Part(src, Split("valid", data.valid_share), data.clean))
    return train, valid


def _tokenizer(spec, parts, cache, report, progress):
    """The tokenizer and its folder in the cache."""
    parts = [] if isinstance(spec, Byte | File) else parts
    path = cache / "tokenizers" / _key(spec.fingerprint(), *(part.key() for part in parts))
    with _made_once(path, cache) as missing:
        if missing:
            if not path.is_dir():
                _train_tokenizer(spec, parts, path, progress)
            parents = [parent for part in parts for parent in part.source.artifacts()]
            with explained(path):
                artifact.record(
                    path, "tokenizer", parents, {**Tokenizer.load(path).facts, "spec": repr(spec)}
                )
    tokenizer = Tokenizer.load(path)
    asked = getattr(spec, "vocab_size", None)
    if asked is not None and tokenizer.vocab_size < asked:
        what = f"{spec!r} reached {tokenizer.vocab_size}: the text supports no more"
        report.note("vocabulary_smaller_than_asked", what)
        warnings.warn(f"{what}; ask for {tokenizer.vocab_size}, or train on more text", stacklevel=3)
    return tokenizer, path


def _train_tokenizer(spec, parts, path, progress):
    meter = _Meter(progress, "tokenizer", _total(parts))
    texts = (text for part in parts for d in meter.watch(part.documents(Report())) for text in texts_of(d))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tokenizer = spec.train(texts)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    with explained(path):
        try:
            tokenizer.save(partial)
            publish(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _template(tokenizer, beside, where, report) -> tuple[ChatTemplate, dict[str, str]]:
    """The template of conversations, and `beside` with it."""
    found = released.chat(beside, where)
    if found is not None:
        return found, beside
    if tokenizer.eos_id is None:
        raise ValueError(
            f"{where}: the tokenizer comes without a chat template and has no eos token to end replies with; give "
            "one that has, such as File('MODEL.gguf')"
        )
    report.note("plain_chat_template", "the tokenizer comes with none")
    warnings.warn(
        "the tokenizer comes without a chat template: conversations are written by PLAIN of "
        "lmx.data.chat_template; to use a released model's, name its folder or GGUF file: tokenizer=File(...)",
        stacklevel=3,
    )
    roles = json.dumps({role: token for role, token in tokenizer.roles.items() if token}, ensure_ascii=False)
    beside = beside | {"chat_template.jinja": PLAIN, "tokenizer_config.json": roles}
    return released.chat(beside, where), beside


def _count_cut(source: Source, store: TokenStore, seq_len: int, report: Report) -> None:
    found = windows(store.offsets, store.mask, seq_len, source.keep)
    if source.keep == "pair":
        if found.n_unused:
            report.skip("pairs_too_long", f"{source.label}, more than {seq_len} tokens", found.n_unused)
        return
    where = f"{source.label}, {source.keep} kept of more than {seq_len} tokens"
    if found.n_cut:
        report.note("conversations_cut", where, found.n_cut)
    if found.n_unused:
        report.skip("conversations_too_long_for_a_reply", where, found.n_unused)


def _store(part, tokenize, tokenizer_path, cache, stage, progress) -> TokenStore:
    """The token store of a part of the data; a source of many files is tokenized group by group, then joined."""
    path = cache / "stores" / part.store_key(tokenize)
    with _made_once(path, cache) as missing:
        if missing:
            meter = _Meter(progress, stage, _total([part]))
            groups = _groups(part, tokenize, cache)
            if not path.is_dir() and groups:
                _join(path, part, groups, tokenize, cache, meter)
            elif not path.is_dir():
                _write(path, part, tokenize, meter)
            for partial, _ in groups:
                _remove(partial, cache)
            meta = TokenStore(str(path)).meta
            facts = {k: v for k, v in meta.items() if k not in ("report", "version")} | {
                "source": part.source.label
            }
            with explained(path):
                artifact.record(path, "corpus", [*part.source.artifacts(), tokenizer_path], facts)
    return TokenStore(str(path))


def _groups(part, tokenize, cache) -> list[tuple[Path, _Part]]:
    """(where its store is kept meanwhile, the group) for each group of a source's files; none for one alone."""
    groups = [replace(part, source=group) for group in part.source.groups(GROUP_BYTES)]
    if len(groups) == 1:
        return []
    return [(cache / "parts" / group.store_key(tokenize), group) for group in groups]


def _writer(path, part, tokenize) -> Writer:
    writer = Writer(
        path, tokenize.tokenizer.vocab_size, tokenize.tokenizer.hash, part.source.masked, part.source.scored
    )
    if part.source.masked:
        writer.facts["keep"] = part.source.keep
    return writer


def _write(path, part, tokenize, meter):
    report, counts, read = Report(), dict.fromkeys(COUNTS, 0), 0
    documents = meter.watch(part.documents(report), counts)
    with _writer(path, part, tokenize) as writer:
        for document in tokenize(documents, report):
            writer.add(
                document["ids"], document.get("more", False), document.get("mask"), document.get("score")
            )
            read += 1
        refused = report.skipped.get("refused_by_the_template")
        if refused and not read:
            raise NoDocument(
                f"{part.source.label}: the template refuses every conversation. {report}", report
            )
        writer.facts.update(counts, report=report.to_json())


def _join(path, part, groups, tokenize, cache, meter):
    """Writes a store for each group of files, unless an earlier attempt has, and then all of them as one."""
    report, counts, made = Report(), dict.fromkeys(COUNTS, 0), []
    for partial, group in groups:
        try:
            made.append(_part_store(partial, group, tokenize, cache, meter))
        except NoDocument as error:
            report.add(error.report)
            continue
        report.add(Report.from_json(made[-1].meta["report"]))
        counts = {name: n + made[-1].meta[name] for name, n in counts.items()}
    if not made:
        raise NoDocument(f"no usable document in {len(groups)} groups of files. {report}", report)
    with _writer(path, part, tokenize) as writer:
        for store in made:
            writer.append(store)
        writer.facts.update(counts, report=report.to_json())


def _part_store(partial, group, tokenize, cache, meter) -> TokenStore:
    """Opened under the lock: another process, that joins the same files, may remove the folder after it."""
    with _locked(partial, cache):
        if not partial.is_dir():
            _write(partial, group, tokenize, meter)
        return TokenStore(str(partial))


def _remove(partial, cache):
    """Renamed first, so that the folder also disappears whole."""
    with _locked(partial, cache), contextlib.suppress(OSError):
        shutil.rmtree(partial.rename(partial.with_name(f".{partial.name}.removed.tmp")))


COUNTS = ("text_bytes", "text_chars", "text_words")


@dataclass
class _Meter:
    """Counts the text that passes and reports the progress of one stage."""

    progress: Progress
    stage: str
    total: int | None
    done: int = 0

    def watch(
        self, documents: Iterator[Document], counts: dict[str, int] | None = None
    ) -> Iterator[Document]:
        """The same documents; adds their bytes, characters and words between white space to `counts`."""
        told = self.done
        for document in documents:
            for text in texts_of(document):
                n_bytes = len(text.encode("utf-8"))
                self.done += n_bytes
                if counts is not None:
                    counts["text_bytes"] += n_bytes
                    counts["text_chars"] += len(text)
                    counts["text_words"] += len(text.split())
            if self.done - told >= 1 << 20:
                told = self.done
                self.progress(self.stage, self.done, self.total)
            yield document
        self.progress(self.stage, self.done, self.total)


def _total(parts: list[_Part]) -> int | None:
    """Bytes of the files to read, None if some are compressed."""
    paths = [path for part in parts for path in part.source.files() if path.is_file()]
    if any(path.suffix in (".gz", ".zst", ".parquet") for path in paths):
        return None
    return sum(path.stat().st_size for path in paths)


@contextlib.contextmanager
def _made_once(path: Path, cache: Path) -> Iterator[bool]:
    """Whether the folder is still to be made; if so, other processes wait until the block ends."""
    with explained(cache):
        found = artifact.read(path)
    if found is not None:
        yield False
        return
    with _locked(path, cache):
        yield artifact.read(path) is None


@contextlib.contextmanager
def _locked(path: Path, cache: Path) -> Iterator[None]:
    """Other processes that ask for the same folder wait until the block ends. What a killed one left of it
    half made is removed."""
    with contextlib.ExitStack() as held:
        with explained(cache):
            (cache / "locks").mkdir(parents=True, exist_ok=True)
            lock = cache / "locks" / f"{path.parent.name}-{path.name}"
            held.enter_context(artifact.alone(lock, wait=True))
        for abandoned in path.parent.glob(f".{path.name}.*.tmp"):
            shutil.rmtree(abandoned, ignore_errors=True)
        yield


def _key(*of: str) -> str:
    return hashlib.sha256(repr((VERSION, *of)).encode()).hexdigest()[:24]
