"""A run: the tree of all its choices. Two runs differ by the values in which they differ, and by nothing else."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import lmx.tasks  # noqa: F401  a saved run may name its Answers
from lmx import tree, values
from lmx.adapt import Surgery  # with all the surgeries that a saved run may name
from lmx.data import ChatTemplate, Data, Preferences, Tokenizer
from lmx.losses import NextToken, Term
from lmx.mesh import MeshConfig
from lmx.models import Model, TransformerConfig, build, prefixed, pretrained, unstacked
from lmx.optim import AdamW, Schedule, Update
from lmx.train import past
from lmx.train.metrics import NAMES
from lmx.train.step import Enrich
from lmx.weights import Weight, shape_of


@dataclass(frozen=True)
class Run:
    """model, data, optim: what is trained, on what, and how its updates are made.
    objective: named loss terms. start: surgeries on the fresh parameters. trainable: pattern of the paths that learn.
    enrich: what the step adds to each batch. steps: updates; n_micro: parts a batch is cut into to save memory.
    eval_every, save_every: in steps; eval_batches: None means all validation rows. eval_lengths: rows of these lengths
    are judged too. patience: the run stops early after this many evaluations in a row without a new lowest valid/loss
    (see `Session.evaluate`); None never stops it. keep: latest checkpoints kept, beside the best. max_skips: updates in
    a row that may be left out as not finite before the run stops.
    """

    model: TransformerConfig = TransformerConfig()
    data: Data = Data()
    optim: Update = AdamW()
    objective: dict[str, Term] = field(default_factory=lambda: {"ce": Term(NextToken())})
    start: tuple[Surgery, ...] = ()
    trainable: str = "*"
    enrich: Enrich = Enrich()
    steps: int = 1000
    n_micro: int = 1
    mesh: MeshConfig = MeshConfig()
    seed: int = 0
    eval_every: int = 250
    eval_batches: int | None = None
    eval_lengths: tuple[int, ...] = ()
    patience: int | None = None
    save_every: int = 500
    keep: int = 3
    max_skips: int = 10

    def __post_init__(self):
        for name in ("steps", "n_micro", "eval_every", "save_every", "keep", "max_skips"):
            if getattr(self, name) < 1:
                raise ValueError(f"Run: {name}={getattr(self, name)} must be at least 1")
        if self.steps >= 2**31:
            raise ValueError(f"Run: steps={self.steps} is beyond 2**31 - 1, the last step that int32 counts")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"Run: seed={self.seed} is outside 0 to 2**32 - 1")
        if self.eval_batches is not None and self.eval_batches < 1:
            raise ValueError(f"Run: eval_batches={self.eval_batches} must be at least 1, or None for all")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"Run: patience={self.patience} must be at least 1, or None to never stop early")
        if self.patience is not None and not (self.data.valid or self.data.valid_share):
            raise ValueError(
                f"Run: patience={self.patience} waits for a lower held-out loss, and nothing is held out; set "
                "data.valid or data.valid_share, or patience=None"
            )
        if any(length < 1 for length in self.eval_lengths):
            raise ValueError(f"Run: eval_lengths={self.eval_lengths} must be at least 1 each")
        if not self.objective:
            raise ValueError("Run: objective has no term; use {'ce': Term(NextToken())}")
        pairs = [name for name, term in self.objective.items() if term.loss.of_pairs]
        for part in ("train", "valid"):
            sources = getattr(self.data, part)
            if pairs and sources and not any(isinstance(one, Preferences) for one in sources):
                raise ValueError(
                    f"Run: objective term {pairs[0]!r} is of pairs of replies, and data.{part} has none; add a "
                    "Preferences(path) to it"
                )
        for name in self.objective:
            if name in NAMES or name.startswith("valid/"):
                raise ValueError(
                    f"Run: objective term {name!r} would write over the metric of that name; rename it, to "
                    f"none of {', '.join(NAMES)}, valid/..."
                )

    def override(self, changes: dict[str, str]) -> Run:
        """Fields replaced by text, as `--set optim.lr=3e-4` does."""
        return values.override(self, changes)

    def tiny(self) -> Run:
        """The same run in CPU minutes: narrow, short, few steps."""
        a = self.model.attention
        shared = max(1, min(a.n_heads // a.kv_heads, 4))
        attention = replace(a, n_heads=4, n_kv_heads=4 // shared if 4 % shared == 0 else 4, head_dim=None)
        model = replace(
            self.model,
            d_model=64,
            n_layers=min(self.model.n_layers, 2),
            attention=attention,
            mlp=self.model.mlp.tiny(),
            dtype="float32",
            remat="none",
        )
        data = replace(self.data, seq_len=min(self.data.seq_len, 64), batch_size=min(self.data.batch_size, 8))
        return replace(
            self,
            model=model,
            data=data,
            optim=_in_shares(self.optim, self.steps),
            steps=min(self.steps, 50),
            n_micro=1,
            mesh=MeshConfig(),
            eval_every=min(self.eval_every, 25),
            eval_batches=4,
        )

    def save(self, path: str | Path) -> None:
        """Writes the run as text that `load` reads and people can."""
        Path(path).write_text(values.show(self) + "\n", encoding="utf-8")


def load(path: str | Path) -> Run:
    """Reads a saved run. Nothing in the file is executed.

    Raises: FileNotFoundError, or ValueError naming the place that cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no saved run here")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    try:
        return values.parse(text, Run, str(path))
    except ValueError as error:
        source = path.with_name("source.py")
        if not source.exists():
            raise
        raise ValueError(
            f"{error}; if that is a class defined in its source.py, give --source {source}, which executes it"
        ) from None


def _in_shares(value: Any, steps: int) -> Any:
    """A tree of settings whose schedules count in shares of the run where they counted in steps."""
    if isinstance(value, Schedule):
        counts = {name: x for name in ("warmup", "decay") if type(x := getattr(value, name, None)) is int}
        return replace(value, **{name: n / steps for name, n in counts.items()})
    if is_dataclass(value):
        return replace(value, **{f.name: _in_shares(getattr(value, f.name), steps) for f in fields(value)})
    return value


class Trained(NamedTuple):
    """A trained model at hand: `model.apply(params, {"tokens": ...})`, and text through its tokenizer.

    chat: the template of its conversations, which released models have. context: tokens it was made to read at once.
    """

    run: Run
    model: Model
    params: Any
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    context: int

    def for_decoding(self, cache: str = "float") -> Trained:
        """With the parameters as they decode fastest here; on a CPU that is layer by layer.

        cache: "float" or "int8", as `build` has it.
        """
        model = self.model if cache == "float" else build(self.model.config, cache=cache)
        params = prefixed(model.config, self.params)
        params = unstacked(params) if jax.default_backend() == "cpu" else params
        return self._replace(model=model, params=params)


def trained(folder: str | Path, step: int | str = "latest", ema: bool = False) -> Trained:
    """The model of a run's folder, at a step, "latest" or "best"; `ema` takes the averaged parameters.

    A released model serves too: a Hugging Face folder or a GGUF file, which has no steps.

    Raises: FileNotFoundError if the folder holds no run or no checkpoint; ValueError if what it holds is damaged,
    or if averaged parameters are asked for and the run kept none.
    """
    folder = Path(folder)
    if pretrained.is_released(folder):
        found = pretrained.find(folder)
        run = Run(model=found.config, data=Data(seq_len=min(found.context or 1024, 1024), clean=False))
        chat = pretrained.chat(found.beside(), folder)
        context = found.context or run.data.seq_len
        return Trained(run, build(found.config), pretrained.load(found), found.tokenizer(), chat, context)
    run = load(folder / "run.txt")
    model = build(run.model)
    params = jax.tree.map(jnp.asarray, past.learned(folder, run, step, ema))
    _check_shapes(params, jax.eval_shape(model.init, jax.random.key(0)), folder)
    kept = folder / pretrained.KEPT
    beside = pretrained.beside(kept)
    tokenizer = Tokenizer.load(folder).ending_with(pretrained.end_ids(beside, kept))
    context = pretrained.context(beside, kept) or run.data.seq_len
    return Trained(run, model, params, tokenizer, pretrained.chat(beside, kept), context)


def _check_shapes(params: Any, wanted: Any, folder: Path) -> None:
    """Raises: ValueError if a checkpoint's parameters are not those of the run beside it."""
    there, here = ({path: shape_of(w) for path, w in tree.nodes(x, Weight).items()} for x in (params, wanted))
    for path, shape in here.items():
        found = there.get(path)
        first = there.get(path.replace("blocks/", "blocks/0/", 1))
        if path not in there and first:  # layers that differ in their leaves lie one by one
            found = (len(params["blocks"]), *first)
        if found != shape:
            raise ValueError(
                f"{folder}: {path} is {found or 'missing'} in the checkpoint, and run.txt makes it {shape}; they do "
                "not belong together"
            )


@dataclass(frozen=True)
class Experiment:
    """A file that asks one question: its name, its docstring, and its runs by variant; "base" is always one."""

    name: str
    path: Path
    question: str
    runs: dict[str, Run]

    def variant(self, name: str) -> Run:
        if name not in self.runs:
            raise ValueError(f"{self.path}: no variant {name!r}; it has {', '.join(self.runs)}")
        return self.runs[name]


def experiment(path: str | Path) -> Experiment:
    """Imports an experiment file: `base() -> Run`, and if it has variants, `variants() -> dict[str, Run]`.

    It may import modules that lie beside it, unless installed ones have the same name.

    Raises: FileNotFoundError, or ValueError if the file has no base().
    """
    path = Path(path)
    if path.suffix != ".py":
        raise ValueError(f"{path}: not an experiment; give a Python file, such as experiments/positions.py")
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"{path}: no such experiment" + (f"; there are {', '.join(near)}" if near else "")
        )
    module = _import(path)
    if not callable(getattr(module, "base", None)):
        raise ValueError(
            f"{path}: an experiment defines base() -> Run, and may define variants() -> dict[str, Run]"
        )
    runs = {"base": module.base()}
    if callable(getattr(module, "variants", None)):
        runs |= module.variants()
    for name, run in runs.items():
        if not isinstance(run, Run):
            raise ValueError(f"{path}: {name!r} is {run!r:.99}, not a Run")
        if name in (".", "..") or not name or set(name) & set("/\\\0"):
            raise ValueError(f"{path}: variant {name!r} cannot name a folder; use letters, digits and spaces")
    return Experiment(path.stem, path, (module.__doc__ or "").strip(), runs)


def _import(path: Path) -> ModuleType:
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(f"lmx_experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    return module
