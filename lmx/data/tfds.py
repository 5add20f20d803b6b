"""TensorFlow Datasets without TensorFlow: read prepared ones, and prepare our own from any stream of
documents.

`prepare_tfds` writes an ArrayRecord dataset that TFDS, and through it grain, reads by index:

    builder = tensorflow_datasets.builder_from_directory(folder)
    grain.MapDataset.source(builder.as_data_source(split="train")).shuffle(seed=0).batch(8)

Reading needs the prepared files alone, not the dataset's own code. Files in TFDS's older default, TFRecord,
are read one after the other by the published format (tensorflow.org/tutorials/load_data/tfrecord), without
checking their CRCs.
"""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lmx import artifact

from .sources import Source
from .store import explained

_READABLE = ("array_record", "tfrecord")


def prepare_tfds(
    documents: Iterable[dict[str, Any]] | dict[str, Iterable[dict[str, Any]]],
    name: str,
    data_dir: str | Path,
    version: str = "1.0.0",
    description: str = "Documents prepared by lmx.",
) -> Path:
    """Writes documents, read once and in order, as a TFDS dataset in ArrayRecord files; a finished one of
    the same documents is kept as it is, and so, with a warning, is one whose documents cannot be compared.

    Args:
      documents: a source or stream of documents, the split "train"; or a stream for each split by name.
      name: "name" or "name/config", of lower-case letters, digits and underscores (a config may have hyphens
      too).
      data_dir: TFDS root: the dataset comes to data_dir/name[/config]/version.
    Returns: the folder of the dataset. Features: text and id, both Text, and more, bool (see sources.py).
    Raises: ImportError naming what to install; ValueError on a bad name, or where a dataset of other documents
      has it; OSError that names the folder.
    """
    tfds = _tfds()
    dataset, _, config = name.partition("/")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", dataset) or not re.fullmatch(r"[A-Za-z0-9_.-]*", config):
        raise ValueError(
            f"prepare_tfds: name={name!r}; use lower-case letters, digits and underscores: 'corpus/hi'"
        )
    splits = documents if isinstance(documents, dict) else {"train": documents}
    if any(isinstance(stream, Source) and stream.masked for stream in splits.values()):
        raise ValueError(
            "prepare_tfds: it writes texts, not conversations or answers; keep those in JSONL or Parquet"
        )
    setup = tfds.core.BuilderConfig(name=config, version=version, description=description) if config else None

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [setup] if setup else []
        pkg_dir_path, code_path = Path(__file__).parent, Path(__file__)

        def _info(self):
            import numpy as np

            text = tfds.features.Text
            features = tfds.features.FeaturesDict({"text": text(), "id": text(), "more": np.bool_})
            return tfds.core.DatasetInfo(
                builder=self, description=description, features=features, disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(stream) for split, stream in splits.items()}

        def _generate_examples(self, stream):
            for i, document in enumerate(stream):
                row = {
                    "text": document["text"],
                    "id": document.get("id", str(i)),
                    "more": document.get("more", False),
                }
                yield i, row

    Builder.name = dataset
    tfds.disable_progress_bar()
    with explained(Path(data_dir) / name):
        builder = Builder(
            data_dir=str(data_dir), file_format="array_record", **({"config": setup} if setup else {})
        )
        folder = Path(builder.data_path)
        sources = {split: stream for split, stream in splits.items() if isinstance(stream, Source)}
        known = {split: stream.fingerprint() for split, stream in sources.items()}
        if folder.is_dir():
            _check_same(folder, list(splits), known)
            return folder
        builder.download_and_prepare()
        parents = [parent for stream in sources.values() for parent in stream.artifacts()]
        facts = {"name": name, "version": version, "splits": list(splits), "documents": known}
        artifact.record(folder, "tfds", parents, facts)
    return folder


def _check_same(folder: Path, splits: list[str], known: dict[str, str]) -> None:
    """That a finished dataset has these splits, and the documents of those whose fingerprint is known.

    Warns where it cannot be known. Raises: ValueError where they differ.
    """
    made = artifact.read(folder)
    before = made.facts.get("documents", {}) if made else {}
    other = [split for split in splits if split in known and known[split] != before.get(split, known[split])]
    if other or (made and set(made.facts.get("splits", splits)) != set(splits)):
        what = f"split {other[0]!r} of other documents" if other else f"splits {made.facts['splits']}"
        raise ValueError(
            f"prepare_tfds: {folder} was made before, with {what}; give another version or data_dir"
        )
    if unknown := [split for split in splits if not (split in known and split in before)]:
        warnings.warn(
            f"{folder} was made before and is taken as it is: whether split {unknown[0]!r} has these "
            "documents is not known; if not, give another version or data_dir",
            stacklevel=3,
        )


def folder_of(name: str, data_dir: str | None = None) -> Path:
    """The folder of a prepared dataset: "name[/config][:version]" under data_dir, newest version, or a
    folder's own path.

    Raises: ImportError naming what to install; FileNotFoundError with the way to prepare it, if it is not
    there.
    """
    if (Path(name) / "dataset_info.json").is_file():
        return Path(name)
    root = Path(data_dir or _tfds().core.constants.DATA_DIR).expanduser()
    dataset, _, version = name.partition(":")
    versions = {p.parent.name: p.parent for p in (root / dataset).glob("*/dataset_info.json")}
    wanted = version or max(versions, key=_version_key, default="")
    if wanted in versions:
        return versions[wanted]
    prepared = sorted(p.parent.relative_to(root).as_posix() for p in root.glob("*/**/dataset_info.json"))
    have = f"it has {', '.join(prepared[:8]) or 'none'}"
    build = f"tfds.builder('{dataset}', data_dir='{root}', file_format='array_record')"
    raise FileNotFoundError(
        f"tfds:{name} is not prepared in {root} ({have}). Prepare it once with\n"
        f"  import tensorflow_datasets as tfds; {build}.download_and_prepare()\n"
        "which for some datasets needs `pip install tensorflow`, for this step alone; or copy its folder "
        "from gs://tfds-data/datasets; or make it from documents of your own with lmx.data.prepare_tfds"
    )


def examples(name: str, split: str, field: str, data_dir: str | None = None) -> Iterator[dict[str, Any]]:
    """{field: bytes, "more": bool} of each example of a split, in stored order.

    Raises: FileNotFoundError as folder_of; ValueError naming the splits, features or format there are.
    """
    tfds = _tfds()
    builder = tfds.builder_from_directory(str(folder_of(name, data_dir)))
    if not isinstance(dict(builder.info.features or {}).get(field), tfds.features.Text):
        raise ValueError(
            f"tfds:{name}: no text feature {field!r}; it has {_kinds(builder)}: Tfds(name, field=...)"
        )
    for found in _parsed(builder, name, split):
        more = found["more"].int64_list.value if "more" in found else ()
        yield {field: b"".join(found[field].bytes_list.value), "more": bool(more and more[0])}


def rows(name: str, split: str, data_dir: str | None = None) -> Iterator[dict[str, Any]]:
    """{feature: value} of each example of a split, in stored order: text and other bytes as bytes, numbers as
    they are stored (a class as its number), a list for a feature that has a shape.

    Raises: as `examples`.
    """
    builder = _tfds().builder_from_directory(str(folder_of(name, data_dir)))
    scalars = {key for key, kind in dict(builder.info.features or {}).items() if kind.shape == ()}
    for found in _parsed(builder, name, split):
        lists = {
            key: list(getattr(x, x.WhichOneof("kind")).value) for key, x in found.items() if x.ListFields()
        }
        yield {key: x[0] if key in scalars and len(x) == 1 else x for key, x in lists.items()}


def _parsed(builder, name, split):
    """The tf.train.Feature values of each example, by name."""
    from tensorflow_datasets.proto import tf_example_pb2

    if split.partition("[")[0] not in builder.info.splits:
        raise ValueError(
            f"tfds:{name}: no split {split!r}; it has {', '.join(map(repr, builder.info.splits))}"
        )
    formats = [f.value for f in builder.info.available_file_formats()]
    read = {"array_record": _array_records, "tfrecord": _tfrecords}.get(
        next(filter(_READABLE.__contains__, formats), "")
    )
    if read is None:
        raise ValueError(f"tfds:{name} is stored as {', '.join(formats)}; prepare it again as array_record")
    for record in read(builder, split):
        yield tf_example_pb2.Example.FromString(record).features.feature


def _kinds(builder):
    return ", ".join(f"{k!r} ({type(v).__name__})" for k, v in dict(builder.info.features or {}).items())


def _array_records(builder, split, chunk=256):
    raw = _tfds().decode.DeserializeMethod.RAW_BYTES
    source = builder.as_data_source(split=split, deserialize_method=raw)
    for start in range(0, len(source), chunk):
        yield from source.__getitems__(list(range(start, min(start + chunk, len(source)))))


def _tfrecords(builder, split):
    """Records are: length uint64, its CRC uint32, the bytes, their CRC uint32, all little-endian."""
    for part in builder.info.splits[split].file_instructions:
        path = Path(part.filename)
        with path.open("rb") as f:
            for i in range(part.skip + part.take if part.take >= 0 else part.examples_in_shard):
                head = f.read(12)
                size = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else 0
                record = f.read(size)
                if len(head) < 12 or len(record) < size or len(f.read(4)) < 4:
                    raise ValueError(
                        f"{path}: damaged after record {i:,}; fetch or prepare the dataset again"
                    )
                if i >= part.skip:
                    yield record


def _version_key(version):
    return [int(part) if part.isdigit() else -1 for part in version.split(".")]


def _tfds():
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise ImportError(
            "TFDS datasets need tensorflow-datasets and grain: pip install 'lmx[tfds]'"
        ) from None
    return tfds
