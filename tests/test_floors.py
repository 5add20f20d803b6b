"""Imports point down, never up or sideways; this file reads the import lines and follows none."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lmx

ROOT = Path(lmx.__file__).parent
FLOORS = {
    "ground": ("tree values artifact", "ops", "weights losses text"),
    "parts": ("formats", "nn data curate optim mesh report"),
    "wholes": ("models adapt distill generate tasks",),
    "acts": ("train evals bulk serve sweep plan",),
    "words": ("run", "tune", "quickstart", "cli", "__main__"),
}
"""From below, as in the style guide; a floor may have steps, and an import must go down a step or more."""
STEPS = [step for steps in FLOORS.values() for step in steps]
FLOOR = {part: n for n, step in enumerate(STEPS) for part in step.split()}
GROUND = " ".join(FLOORS["ground"]).split()
GROUND_IMPORTS = {"jax", "jaxlib", "numpy", "jaxtyping", "regex", "llvmlite"}


def modules():
    return sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def imports(source: str, module: str, is_package: bool):
    """(line, dotted name) of every module that the source imports, below `if TYPE_CHECKING` excepted.

    `from a import b` counts as a.b, which is a module or a name of one.
    """
    tree = ast.parse(source)
    exempt = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in exempt:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = module.split(".")[: None if is_package else -1]
            above = home[: len(home) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def breaches(module: str, imported):
    """What an import line of `module` does against the floor plan, in words."""
    part = module.split(".")[1]
    for line, name in imported:
        first, *rest = name.split(".")
        if first != "lmx":
            if part in GROUND and first not in GROUND_IMPORTS | set(sys.stdlib_module_names):
                yield f"{module}:{line} imports {name}: the ground knows jax and numpy only"
            continue
        target = rest[0] if rest else ""
        if target in ("", "Run", "__version__", "__file__"):
            continue
        if target not in FLOOR:
            yield f"{module}:{line} imports {name}, which stands on no floor"
        elif target != part and FLOOR[target] >= FLOOR[part]:
            way = "up" if FLOOR[target] > FLOOR[part] else "sideways"
            yield f"{module}:{line} imports {name}: {way}, from floor {FLOOR[part]} to {FLOOR[target]}"


def found_in(path: Path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    return breaches(module, imports(path.read_text(encoding="utf-8"), module, is_package))


def test_every_part_stands_on_a_floor():
    parts = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in modules()}
    assert len(parts) > 10
    assert parts <= set(FLOOR), f"on no floor: {sorted(parts - set(FLOOR))}"
    assert set(lmx._PARTS) <= set(FLOOR)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    assert list(found_in(path)) == []


@pytest.mark.parametrize(
    "module, line, wrong",
    [
        ("lmx.ops.mask", "from lmx.nn import Block", "up"),
        ("lmx.ops.mask", "import lmx.train.step", "up"),
        ("lmx.ops.mask", "from lmx import train", "up"),
        ("lmx.ops.mask", "from ..train import step", "up"),
        ("lmx.ops.mask", "def f():\n    from lmx.losses import Term", "up"),
        ("lmx.losses.base", "from lmx.weights import linear", "sideways"),
        ("lmx.nn.block", "from lmx.data import Data", "sideways"),
        ("lmx.tree", "from lmx import values", "sideways"),
        ("lmx.plan", "from lmx.train import program", "sideways"),
        ("lmx.ops.mask", "import flax", "jax and numpy only"),
        ("lmx.nn.block", "from lmx.helpers import f", "no floor"),
        ("lmx.ops.mask", "from .position import RoPE", None),
        ("lmx.ops.mask", "from lmx.ops import position", None),
        ("lmx.ops.mask", "from lmx import tree", None),
        ("lmx.models.presets", "from lmx.nn import Block", None),
        ("lmx.nn.block", "import flax", None),
        ("lmx.ops.mask", "if TYPE_CHECKING:\n    from lmx.models import Model", None),
    ],
)
def test_the_reader_of_imports_sees(module, line, wrong):
    found = list(breaches(module, imports(line, module, False)))
    assert (found and wrong in found[0]) if wrong else not found


def test_import_lmx_is_quick_and_starts_nothing():
    script = """
import sys, time
start = time.perf_counter()
import lmx
print(time.perf_counter() - start)
heavy = {"jax", "jaxlib", "torch", "numpy", "flax", "matplotlib", "tokenizers"}
print(sorted(heavy & set(sys.modules)), lmx.__version__)
assert "Run" in dir(lmx)
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout.split("\n")
        for _ in range(3)
    ]
    assert min(float(lines[0]) for lines in runs) < 0.3
    assert runs[0][1] == f"[] {lmx.__version__}"


def test_no_part_pulls_in_torch_and_no_backend_starts_by_import():
    """Loads every part and every module but those of the command line."""
    names = [".".join(("lmx", *p.relative_to(ROOT).with_suffix("").parts)) for p in modules()]
    script = f"""
import importlib, sys
for name in {[n.removesuffix(".__init__") for n in names if "__main__" not in n]}:
    importlib.import_module(name)
from jax._src.xla_bridge import backends_are_initialized
heavy = {{"torch", "transformers", "tensorflow", "matplotlib", "wandb"}}
print(sorted(heavy & set(sys.modules)), backends_are_initialized())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"


def test_every_part_can_be_had_by_its_name():
    parts = {p.stem for p in ROOT.iterdir() if not p.name.startswith("_")}
    assert parts == set(lmx._PARTS)
    assert lmx.adapt.chain is lmx.weights.surgery.chain


def test_an_unknown_part_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        lmx.trian  # noqa: B018
