"""Configuration trees survive as text; text of strangers is read and never executed."""

from __future__ import annotations

import ast
import contextlib
import math
import re
import string
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings

from lmx import values
from lmx.run import Run


@dataclass(frozen=True)
class Shape:
    """The plain one, and the base of the others."""


@dataclass(frozen=True)
class Circle(Shape):
    radius: float = 1.0
    name: str | None = None


@dataclass(frozen=True)
class Group(Shape):
    parts: tuple[Shape, ...] = ()
    scale: float | int = 1
    pair: tuple[int, float] = (1, 2.0)


@dataclass(frozen=True)
class Scene:
    title: str
    count: int = 3
    shape: Shape = Shape()
    shapes: dict[str, Shape] = field(default_factory=dict)
    source: Shape | str = "none given"
    sources: tuple[Shape | str, ...] = ()
    visible: bool = True
    mode: Literal["fast", "slow"] = "fast"
    limit: int | None = None
    width: float = 2.0


ints = st.integers()
floats = st.floats(allow_nan=False)
text = st.text(max_size=12)
shapes = st.recursive(
    st.just(Shape()) | st.builds(Circle, floats, st.none() | text),
    lambda inner: st.builds(
        Group, st.lists(inner, max_size=3).map(tuple), floats | ints, st.tuples(ints, floats)
    ),
    max_leaves=6,
)
scenes = st.builds(
    Scene,
    text,
    ints,
    shapes,
    st.dictionaries(text, shapes, max_size=3),
    shapes | text,
    st.lists(shapes | text, max_size=3).map(tuple),
    st.booleans(),
    st.sampled_from(["fast", "slow"]),
    st.none() | ints,
    floats,
)


@given(scenes, st.integers(1, 120))
@settings(max_examples=150)
def test_a_tree_is_text_and_back(scene, width):
    shown = values.show(scene, width)
    assert values.parse(shown, Scene) == scene
    assert values.parse(repr(scene), Scene) == scene
    assert values.diff(values.parse(shown, Scene), scene) == {}


@pytest.mark.parametrize("width", [60, 100])
def test_a_run_is_broken_into_lines_that_fit_and_end_where_python_ends_them(width):
    lines = values.show(Run(), width).splitlines()
    assert len(lines) > 10 and max(map(len, lines)) <= width
    assert ast.dump(ast.parse("\n".join(lines))) == ast.dump(ast.parse(repr(Run())))


@given(scenes, shapes, floats, text)
def test_an_override_changes_one_place(scene, shape, radius, name):
    scene = replace(scene, shapes={"a": Circle()}, sources=("x", Circle()))
    new = values.override(
        scene,
        {
            "shape": values.show(shape),
            "shapes.a.radius": repr(radius),
            "sources.0": values.show(shape),
            "sources.1.name": repr(name),
        },
    )
    want = replace(scene, shape=shape, shapes={"a": Circle(radius)}, sources=(shape, Circle(name=name)))
    assert new == want
    assert values.override(new, {"shape": values.show(scene.shape)}) == replace(want, shape=scene.shape)


@pytest.mark.parametrize(
    "written, kind, want",
    [
        ("3e-4", float, 3e-4),
        ("3", float, 3.0),
        ("1e3", int, 1000),
        ("-7", int, -7),
        ("1_000", int, 1000),
        ("inf", float, math.inf),
        ("-inf", float | None, -math.inf),
        ("true", bool, True),
        ("False", bool, False),
        ("none", int | None, None),
        ("None", str | None, None),
        ("'None'", str | None, "None"),
        ("none", str, "none"),
        ("12", str, "12"),
        ("", str, ""),
        ("  spaced out ", str, "spaced out"),
        ("' kept '", str, " kept "),
        ("it's", str, "it's"),
        ("हिन्दी.txt", str, "हिन्दी.txt"),
        ("data/a b*.jsonl.gz", Shape | str, "data/a b*.jsonl.gz"),
        ("x.txt", Shape | str, "x.txt"),
        ("f(x)", Shape | str, "f(x)"),
        ("12", int | str, 12),
        ("12 monkeys", int | str, "12 monkeys"),
        ("Circle", Shape, Circle()),
        ("Circle()", Shape | str, Circle()),
        ("Circle(2)", Shape, Circle(2.0)),
        (
            "Group((Circle(1, 'x'), Shape()), pair=(3, 4))",
            Shape,
            Group((Circle(1.0, "x"), Shape()), pair=(3, 4.0)),
        ),
        ("(1, 2)", tuple[int, ...], (1, 2)),
        ("[1, 2]", tuple[int, ...], (1, 2)),
        ("()", tuple[int, ...], ()),
        ("{'a': 1}", dict[str, float], {"a": 1.0}),
        ("(1, 'a', None, [2.5])", tuple, (1, "a", None, (2.5,))),
        ("'slow'", Literal["fast", "slow"], "slow"),
    ],
)
def test_text_is_read_by_the_declared_type(written, kind, want):
    found = values.parse(written, kind)
    assert found == want and type(found) is type(want)


@pytest.mark.parametrize(
    "written, kind, told",
    [
        ("abc", float, "x: 'abc' is not one of float"),
        ("1.5", int, "1.5 is float, expected int"),
        ("1", bool, "expected bool"),
        ("true", int, "True is bool, expected int"),
        ("none", int, "expected int"),
        ("1 +", float, "cannot read '1 \\+' as float"),
        ("Square()", Shape, "'Square\\(\\)' is not one of Circle, Group, Shape"),
        ("Circle(raduis=2)", Shape, "Circle has no setting 'raduis'; it has radius"),
        ("Circle(1, 'a', 3)", Shape, "Circle has 2 settings, given 3"),
        ("Circle(1, radius=2)", Shape, "given radius twice"),
        ("Circle(radius='wide')", Shape, "x.radius: 'wide' is str, expected float"),
        ("Circle(radius='wide')", Shape | str, "x.radius: 'wide' is str, expected float"),
        ("Scene()", Scene, "Scene needs title"),
        ("(1, 2, 3)", tuple[int, float], "expected 2 items, got 3"),
        ("(1, 'a')", tuple[int, ...], "x.1: 'a' is str, expected int"),
        ("{1: Circle()}", dict[str, Shape], "1 is int, expected str"),
        ("{**{}}", dict[str, Shape], "x: '\\*\\*' is not a plain value"),
        ("'medium'", Literal["fast", "slow"], "'medium' is str"),
        ("(1, 2)", float, "is not float"),
        ("1e999999999999j", float, "complex, expected float"),
        ("b'x'", str | int, ""),
    ],
)
def test_a_mistake_is_told_with_its_place_and_the_way_out(written, kind, told):
    if told:
        with pytest.raises(ValueError, match=told):
            values.parse(written, kind, "x")
    else:
        assert values.parse(written, kind, "x") == written


@pytest.mark.parametrize(
    "path, told",
    [
        ("optim.Lr", r"no setting 'optim.Lr'; did you mean optim.lr"),
        ("learning_rate", "did you mean"),
        ("n_heads", "did you mean model.attention.n_heads"),
        ("model.n_layer", "did you mean model.n_layers"),
        ("optim.lr.x", "no setting 'optim.lr.x'"),
        ("objective.kd", "no setting 'objective.kd'; did you mean objective"),
        ("start.0", "no setting 'start.0'"),
        ("", "no setting ''"),
        ("model.__class__", "no setting"),
    ],
)
def test_an_unknown_setting_names_the_nearest(path, told):
    with pytest.raises(ValueError, match=told):
        values.override(Run(), {path: "1"})


HOSTILE = [
    "__import__('os').system('touch {}')",
    "open('{}', 'w')",
    "Circle(__import__('pathlib').Path('{}').touch())",
    "Circle(radius=(lambda: open('{}', 'w'))())",
    "[open('{}', 'w') for _ in (1,)][0]",
    "Circle.__init__.__globals__['open']('{}', 'w')",
    "f\"{{open('{}', 'w')}}\"",
    "(x := open('{}', 'w'))",
    "Shape.__subclasses__()",
    "exec('1')",
    "Circle(*(1, 2))",
    "Circle(**{{'radius': 1}})",
    "os.environ",
    "()()()",
    "(" * 5000,
    "[" * 150 + "]" * 150,
    "-" * 5000 + "1",
    "1+" * 5000 + "1",
    "Group((" * 80 + "))" * 80,
    "9" * 5000,
    "10**10**10",
    "'a' * 10**9",
    "\0",
    "\ud800",
    "Circle(1)\nimport os",
    "Circle(1);1",
    "#",
    "\\",
    "...",
]


@pytest.mark.parametrize("attack", HOSTILE, ids=lambda attack: attack[:30].encode("unicode_escape").decode())
@pytest.mark.parametrize("kind", [Shape, float, tuple[Shape, ...], dict[str, Shape], int | None], ids=str)
def test_hostile_text_is_refused_without_being_executed(attack, kind, tmp_path):
    target = tmp_path / "executed"
    with pytest.raises(ValueError) as told:
        values.parse(attack.format(target) if "{}" in attack else attack, kind)
    assert len(str(told.value)) < 2000
    assert not target.exists()


def test_numbers_of_any_size_are_numbers_where_one_is_asked_for():
    assert values.parse("9" * 4000, int) == 10**4000 - 1
    assert values.parse("1e400000", float) == math.inf
    with pytest.raises(ValueError, match="13288 bits is no float"):
        values.parse("9" * 4000, float)
    with pytest.raises(ValueError, match=r"999\.\.\. is int, expected Shape"):
        values.parse("9" * 4000, Shape)


@given(
    st.text(alphabet=string.printable + "०\u200d\ud800\0", max_size=40),
    st.sampled_from([Scene, Shape, float]),
)
@example("{**x}", Scene)
@example("-Circle", Shape)
@settings(max_examples=200)
def test_any_text_is_a_value_or_a_value_error(written, kind):
    with contextlib.suppress(ValueError):
        assert isinstance(values.parse(written, kind), kind)


@given(text)
@settings(max_examples=100)
def test_a_string_field_takes_any_unquoted_text(written):
    found = values.parse(written, str)
    assert found == written.strip() or written.strip()[:1] in "'\""


def test_numbers_of_numpy_are_plain_and_lists_are_tuples():
    """Learning rates often come from np.logspace; the text must not depend on numpy."""
    scene = Scene("t", count=np.int64(4), width=np.float64(0.5), sources=["a", Circle(np.float32(0.25))])
    assert values.parse(values.show(scene), Scene) == Scene("t", 4, width=0.5, sources=("a", Circle(0.25)))
    assert "np" not in values.show(scene)
    assert values.diff(values.parse(values.show(scene), Scene), scene) == {}


def test_one_step_differs_from_a_share_of_one():
    assert values.diff({"warmup": 1}, {"warmup": 1.0}) == {"warmup": (1, 1.0)}
    assert values.diff({"warmup": 1}, {"warmup": 1}) == {}


def test_two_classes_of_one_name_are_not_guessed_between():
    class Base:
        pass

    same = [dataclass(frozen=True)(type("Leaf", (Base,), {"__module__": home})) for home in ("here", "there")]
    with pytest.raises(ValueError, match=r"Leaf is defined in here and there; rename one of them"):
        values.parse("Leaf()", Base)
    same[1].__module__ = "here"  # as when an experiment's file is imported again
    assert type(values.parse("Leaf()", Base)) in same


@pytest.mark.parametrize(
    "written, item",
    [
        ("s.txt", "'s.txt'"),
        ("'s.txt'", "'s.txt'"),
        ("corpus/*.txt", "'corpus/*.txt'"),
        ("Circle", "Circle(radius=1.0, name=None)"),
    ],
)
def test_one_item_where_a_tuple_is_asked_for_is_told_how_to_write_it(written, item):
    with pytest.raises(ValueError, match=rf"^x: .*; write a tuple: {re.escape(f'({item},)')}$"):
        values.parse(written, tuple[Shape | str, ...], "x")


def test_a_broken_tuple_is_not_taken_for_an_item():
    with pytest.raises(ValueError) as error:
        values.parse("('s.txt'", tuple[str, ...], "x")
    assert "write a tuple" not in str(error.value)


@pytest.mark.parametrize("name", ["Abstract", "_Private"])
def test_abstract_and_private_classes_are_no_choices(name):
    @dataclass(frozen=True)
    class Abstract(ABC):
        @abstractmethod
        def act(self): ...

    @dataclass(frozen=True)
    class _Private(Abstract):
        def act(self): ...

    @dataclass(frozen=True)
    class Public(_Private):
        pass

    assert values.parse("Public()", Abstract) == Public()
    for written, kind in ((f"{name}()", Abstract), (f"({name}(),)", tuple[Abstract | str, ...])):
        with pytest.raises(ValueError, match=rf"{name}\(\)' is not one of Public$"):
            values.parse(written, kind)


def test_leaves_and_diff_name_every_choice():
    a = Scene("t", shape=Circle(2.0), sources=("x",))
    b = replace(a, shape=Group((Circle(2.0),)), sources=())
    assert values.leaves(Circle(2.0)) == {"radius": 2.0, "name": None}
    assert values.leaves(a)["shape"] == "Circle" and values.leaves(a)["shape.radius"] == 2.0
    found = values.diff(a, b)
    assert found["shape"] == ("Circle", "Group") and found["sources.0"] == ("x", None)
    assert found["shape.parts.0.radius"] == (None, 2.0) and "title" not in found
    assert values.diff(a, a) == {}


@given(st.floats() | ints, st.sampled_from(["[0, 1)", "(0, inf)", "(-inf, inf)", "[1, inf)", "(0, inf]"]))
def test_a_number_is_refused_outside_its_range(x, wanted):
    """Against the sets themselves: the reals between the ends, and the ends that a square bracket takes in."""
    low, high = (float(end) for end in wanted.strip("[]()").split(","))
    inside = low < x < high or (x == low and wanted[0] == "[") or (x == high and wanted[-1] == "]")
    with (
        contextlib.nullcontext()
        if inside
        else pytest.raises(ValueError, match=r"Circle: radius=.* is not in")
    ):
        values.check(Circle(x), radius=wanted)


def test_none_is_a_number_only_where_it_is_named():
    values.check(Circle(None), radius="(0, inf) or None")
    with pytest.raises(ValueError, match=r"Circle: radius=0 is not in \(0, inf\) or None"):
        values.check(Circle(0), radius="(0, inf) or None")


def test_errors_of_a_class_keep_their_words():
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        values.override(Run(), {"steps": "0"})
    with pytest.raises(
        ValueError, match="n_heads=12 is not a multiple of n_kv_heads=5; use 1, 2, 3, 4, 6, 12"
    ):
        values.override(Run(), {"model.attention": "AttentionConfig(n_heads=12, n_kv_heads=5)"})


def test_a_sequence_or_mapping_is_read_as_the_member_of_the_union_that_fits():
    kind = str | Sequence[str] | Sequence[Mapping[str, Any]] | Mapping[str, str | Sequence[str]]
    for value in ("a.csv", ("a", "b"), ({"क": 1}, {"क": True}), {"hi": "a", "en": ("b", "c")}):
        assert values.parse(values.show(value), kind) == value
    with pytest.raises(ValueError, match=r"value.hi: 1 is int"):
        values.parse("{'hi': 1}", Mapping[str, str | Sequence[str]])
