"""Judges trained runs on text: perplexity per token and per word, and bits per byte, with 95 % intervals.

Only bits per byte compare across tokenizers and scripts; text is cleaned as for training, and bytes are those
of the cleaned text (NFC). Intervals are drawn over documents, so a text of a single document has none. Several
runs are compared with the first, document by document, which sees differences that two separate intervals hide.

  lmx eval runs/quickstart/model hindi.txt english.txt        each text for itself
  lmx eval RUN                                               on what the run itself held out
  lmx eval RUN "books/*.jsonl.zst" --stride 64 --step best   every token sees at least seq_len - 64 before it
  lmx eval runs/a runs/b runs/c hindi.txt                    paired differences from runs/a
  lmx eval RUN hindi.txt --json                              for programs

The results are added to results.json in the run's folder, where its report finds them.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import tyro

from lmx import cli

if TYPE_CHECKING:
    from lmx.artifact import Artifact
    from lmx.data import Data
    from lmx.evals import Perplexity
    from lmx.report.stats import Interval

RESULTS = "results.json"
MEASURES = {"perplexity": "per token", "word_perplexity": "per word", "bits_per_byte": "bits per byte"}


@dataclass(frozen=True)
class Options:
    paths: tyro.conf.Positional[tuple[str, ...]]
    """Runs' folders, and texts: files (text, .jsonl, .gz, .zst, .parquet), patterns, tfds:name, or a source
    with its settings, such as "Jsonl('pairs.jsonl', field='hi')"."""
    step: str = "latest"
    """Of the checkpoint: latest, best or a number."""
    ema: bool = False
    """The moving average of the parameters, which a run with optim.ema keeps."""
    seq_len: int | None = None
    """Tokens in view at most; the run's own if not given."""
    stride: int | None = None
    """Moves a window by this many tokens; without it long documents are cut into pieces."""
    unit: Literal["paragraph", "line", "file"] = "paragraph"
    """What one document is in a plain text file."""
    batch_size: int = 16
    bootstrap: int = 1000
    """Resamples for the intervals."""
    seed: int = 0
    source: Path | None = None
    """The experiment that defines the runs' own classes, such as RUN/source.py; it is executed."""
    json: bool = False
    """Prints JSON instead of tables."""


def main(argv: list[str]) -> None:
    asked = cli.options(Options, argv, __doc__, "eval")
    folders = [path for path in asked.paths if (Path(path) / "run.txt").exists()]
    names = [path for path in asked.paths if path not in folders]
    for name in names:
        if Path(name).suffix == ".gguf" or (Path(name) / "config.json").exists():
            raise ValueError(f"{name}: a released model; convert it first: lmx convert {name} runs/NAME")
        if Path(name).is_dir():
            raise ValueError(f"{name}: a folder without run.txt; for the text in it write '{name}/*.txt'")
    if not folders:
        raise ValueError(
            f"{', '.join(asked.paths) or 'nothing given'}: not a run's folder, which has run.txt"
        )
    from lmx import evals
    from lmx import run as runs
    from lmx.cli.progress import Progress
    from lmx.data.tally import Report
    from lmx.report.runs import read_json

    if asked.source is not None:
        runs.experiment(asked.source)
    for folder in folders:
        read_json(Path(folder) / RESULTS)  # a damaged one is told before anything is computed
    texts = [_named(name, asked.unit, _clean(folders)) for name in names] or [_held_out(folders, asked.step)]
    measured = {}
    lossy = []
    for folder in folders:
        step = cli.step_of(Path(folder), asked.step)
        model = runs.trained(folder, step, asked.ema)
        seq_len = model.run.data.seq_len if asked.seq_len is None else asked.seq_len
        lossy += [] if model.tokenizer.lossless else [folder]
        for text in texts:
            report = Report()
            with Progress() as progress:
                stage = f"{folder} on {text.name}"
                measured[folder, text.name] = evals.perplexity(
                    model.model,
                    model.params,
                    _whole(progress.watch(text.data.documents(text.part, report), stage, None)),
                    model.tokenizer,
                    seq_len=seq_len,
                    stride=asked.stride,
                    batch_size=asked.batch_size,
                    bootstrap=asked.bootstrap,
                    seed=asked.seed,
                    bos=_first(model.tokenizer),
                )
            how = f"step {step}{', averaged' * asked.ema}, {seq_len} tokens"
            how += f", stride {asked.stride}" if asked.stride else ""
            how += f", by {asked.unit}" if names and asked.unit != "paragraph" else ""
            report.warn(text.name)
            try:
                _keep(Path(folder), step, f"{text.name}: {how}", measured[folder, text.name], text)
            except OSError as error:  # what was measured is shown all the same
                warnings.warn(f"not added to {Path(folder) / RESULTS}: {error}", stacklevel=2)
    first, *others = folders
    differences = {
        (other, text.name): evals.compare(
            measured[other, text.name], measured[first, text.name], asked.bootstrap, asked.seed
        )
        for other in others
        for text in texts
    }
    if asked.json:
        print(json.dumps(_plain(measured, differences, first), indent=1, ensure_ascii=False))
    else:
        _print(measured, differences, first)
        if names and any(x.n_documents == 1 for x in measured.values()):
            print("\none document has no interval; --unit line makes a document of each line")
        for folder in lossy:
            print(f"\n{folder}: its tokenizer loses words it does not know, so only others like it compare")


class _Text(NamedTuple):
    """What is judged on: the documents of one part of `data`."""

    name: str
    data: Data
    part: str

    def artifacts(self) -> list[Artifact]:
        """The files that its documents come from."""
        from lmx.data import source

        specs = self.data.valid if self.part == "valid" and self.data.valid else self.data.train
        return [made for spec in specs for made in source(spec).artifacts()]


def _first(tokenizer) -> int | None:
    """What stands before a document: the token that ends documents, where a model's texts begin with none."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def _clean(folders: list[str]) -> bool:
    """Whether texts are cleaned as for training. Raises: ValueError if the runs do not agree."""
    from lmx import run as runs

    cleaned = {folder: runs.load(Path(folder) / "run.txt").data.clean for folder in folders}
    first, *others = folders
    for other in others:
        if cleaned[other] != cleaned[first]:
            raise ValueError(f"{other} and {first} differ in data.clean; judge them one at a time")
    return cleaned[first]


def _named(name: str, unit: str, clean: bool) -> _Text:
    from lmx.data import Data, Text

    found = cli.source_of(name)
    found = replace(found, unit=unit) if isinstance(found, Text) else found
    found.artifacts()  # a missing file is told before anything is computed
    return _Text(name, Data(train=(found,), valid_share=0.0, clean=clean), "train")


def _held_out(folders: list[str], step: str) -> _Text:
    """What the first run held out, if the others held out the same."""
    from lmx import artifact
    from lmx import run as runs
    from lmx.data import source
    from lmx.train.checkpoint import FOLDER

    folder, *others = map(Path, folders)
    data = runs.load(folder / "run.txt").data
    for other in others:
        if _valid(runs.load(other / "run.txt").data) != _valid(data):
            raise ValueError(f"{other} held out other text than {folder}; name a text to judge them on")
    if not (data.valid or data.valid_share):
        raise ValueError(f"{folder} held nothing out; name a text to judge it on")
    if any(source(one).masked for one in data.valid or data.train):
        raise ValueError(
            f"{folder} held out answers, and eval judges texts; their loss is valid/loss in "
            f"{folder / 'metrics.jsonl'}. Name a text, as one of general content: lmx eval {folder} TEXT"
        )
    text = _Text("held out", data, "valid")
    checkpoint = artifact.find(folder / FOLDER / str(cli.step_of(folder, step)))
    seen = {made.hash for made in artifact.ancestors(checkpoint)}
    changed = [made.path for made in text.artifacts() if made.hash not in seen]
    if changed:
        raise ValueError(
            f"{changed[0]}: its content changed since {folder} was trained, so what was held out is no longer "
            f"known; name a text: lmx eval {folder} TEXT"
        )
    return text


def _valid(data: Data) -> tuple:
    """What decides which documents are held out."""
    return data.valid or (data.train, data.valid_share), data.clean


def _whole(documents: Iterable[dict]) -> Iterator[str]:
    """The texts of documents that come in parts."""
    parts: list[str] = []
    for document in documents:
        parts.append(document["text"])
        if not document.get("more"):
            yield "".join(parts)
            parts = []


def _keep(folder: Path, step: int, name: str, found: Perplexity, text: _Text) -> None:
    """Adds a result to the run's results.json, which names the checkpoints and texts that it comes from."""
    from lmx import artifact
    from lmx.report.runs import read_json
    from lmx.train.checkpoint import FOLDER

    path = folder / RESULTS
    parents = [artifact.find(folder / FOLDER / str(step)), *text.artifacts()]
    with artifact.alone(folder / ".results.lock", wait=True):
        results = (read_json(path) or {}) | {name: _facts(found)}
        earlier = artifact.read(path) if path.exists() else None
        artifact.write(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        parents = {parent.hash: parent for parent in (*(earlier.made_from if earlier else ()), *parents)}
        artifact.record(path, "results", parents.values())


def _facts(found: Perplexity) -> dict:
    intervals = {name: _interval(getattr(found, name)) for name in MEASURES}
    return intervals | {"documents": found.n_documents, "tokens": found.n_tokens, "bytes": found.n_bytes}


def _interval(x: Interval) -> dict | float:
    return {"value": x.value, "low": x.low, "high": x.high, "n": x.n} if math.isfinite(x.low) else x.value


def _plain(measured: dict, differences: dict, first: str) -> dict:
    results = [{"run": run, "text": text, **_facts(found)} for (run, text), found in measured.items()]
    compared = [
        {"run": run, "against": first, "text": text}
        | {name: _interval(getattr(found, name)) for name in ("nats_per_word", "bits_per_byte")}
        for (run, text), found in differences.items()
    ]
    return {"results": results, "differences": compared} if compared else {"results": results}


def _print(measured: dict, differences: dict, first: str) -> None:
    from lmx.report.table import Table

    rows = tuple(
        (run, text, x.n_documents, x.n_bytes, *(getattr(x, name) for name in MEASURES))
        for (run, text), x in measured.items()
    )
    print(Table(("run", "text", "documents", "bytes", *MEASURES.values()), rows).text())
    if differences:
        rows = tuple(
            (run, text, x.nats_per_word, x.bits_per_byte, _verdict(x.bits_per_byte))
            for (run, text), x in differences.items()
        )
        caption = f"differences from {first}, paired by document; below 0 is better"
        print("\n" + Table(("run", "text", "nats per word", "bits per byte", ""), rows, caption).text())


def _verdict(difference: Interval) -> str:
    if not difference.excludes(0.0):
        return "not told apart"
    return "better" if difference.value < 0 else "worse"
