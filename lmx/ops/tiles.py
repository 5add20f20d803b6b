"""Rows times int8 and int4 matrices in LLVM's language, for `lmx.ops.native`: y [N, M] = x [N, K] w [M, K]^T.

A tile of several rows and columns of y shares what is read of x and w, and has enough sums at once that none waits for
itself. What one instruction multiplies is a `Unit`:

    AVX2         pmaddwd: 16 pairs of int16, neighbours added. pmaddubsw: 32 codes by int8, neighbours added as int16
    AVX512_VNNI  vpdpbusd: 64 bytes 0 to 255 by int8, added up by fours as int32; so w is read as w + 128

What that adds is subtracted, and depends on x alone: 128 sum(x) for w + 128, and for codes 0 to 15, which stand for
code - 8, 8 sum(x) of each group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lmx.ops.llvm import Lines, everywhere, numbers, pointers, shuffle, whole

STEP = 32
"""Columns of the matrix that a unit takes at the least: K is a multiple of it."""
BLOCK = 8
"""Rows of the matrix that stay in the nearest cache while all rows of x pass."""


@dataclass(frozen=True)
class Avx2:
    """lanes: sums of a vector. step: columns that it takes at once. kind: of the numbers of x beside an int8 matrix.
    rows, columns: of the largest tile."""

    name, lanes, step, kind, dtype, rows, columns = "avx2", 8, 32, "i16", "int16", 4, 2
    intrinsics = """
declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)
declare <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8>, <32 x i8>)
"""

    def matrix(self, f: Lines, at: str, n: int) -> list[str]:
        """n columns of the matrix, as `product` takes them."""
        parts = [f.read("<16 x i8>", at, str(i)) for i in range(0, n, 16)]
        return [f(f"sext <16 x i8> {part} to <16 x i16>") for part in parts]

    def inputs(self, f: Lines, at: str, n: int) -> list[str]:
        """n numbers of x, likewise."""
        return [f.read("<16 x i16>", at, str(i)) for i in range(0, n, 16)]

    def product(self, f: Lines, sums: str, w: list[str], x: list[str]) -> str:
        for pair in zip(w, x):
            sums = f(f"add <8 x i32> {sums}, {self._pairs(f, *pair)}")
        return sums

    def beyond(self, f: Lines, sums: str, x: list[str]) -> str:
        """`sums`, and what `matrix` adds to the products with x."""
        return sums

    def group(self, f: Lines, sums: str, codes: list[str], x: list[str]) -> str:
        """`sums` and the products of a group's codes, up to 256. As int16 they fit: 8 * 2 * 15 * 128 < 2^15."""
        short = "zeroinitializer"
        for pair in zip(codes, x):
            two = ", ".join(f"<32 x i8> {each}" for each in pair)
            short = f(f"add <16 x i16> {short}, {f(f'call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw({two})')}")
        return f(f"add <8 x i32> {sums}, {self._pairs(f, short, numbers('i16', [1] * 16))}")

    def _pairs(self, f: Lines, a: str, b: str) -> str:
        return f(f"call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> {a}, <16 x i16> {b})")


@dataclass(frozen=True)
class Vnni:
    """The same of AVX512_VNNI."""

    name, lanes, step, kind, dtype, rows, columns = "vnni", 16, 64, "i8", "int8", 4, 4
    intrinsics = """
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <16 x i32>, <16 x i32>)
"""

    def matrix(self, f: Lines, at: str, n: int) -> list[str]:
        return [f(f"xor <64 x i8> {_bytes(f, at, n, 64)}, {numbers('i8', [-128] * 64)}")]

    def inputs(self, f: Lines, at: str, n: int) -> list[str]:
        return [_bytes(f, at, n, 64)]

    def product(self, f: Lines, sums: str, w: list[str], x: list[str]) -> str:
        for pair in zip(w, x):
            a, b = (f(f"bitcast <64 x i8> {each} to <16 x i32>") for each in pair)
            call = "call <16 x i32> @llvm.x86.avx512.vpdpbusd.512"
            sums = f(f"{call}(<16 x i32> {sums}, <16 x i32> {a}, <16 x i32> {b})")
        return sums

    def beyond(self, f: Lines, sums: str, x: list[str]) -> str:
        return self.product(f, sums, [numbers("i8", [-128] * 64)] * len(x), x)

    group = product


Unit = Avx2 | Vnni


def int8_chunk(unit: Unit) -> str:
    """`chunk` of (x [N, K], w int8 [M, K]) -> y int32 [N, M]."""
    sums_kind = f"<{unit.lanes} x i32>"

    def tile(f: Lines, r: str, o: str, rows: int, columns: int) -> list[str]:
        x = pointers(f, unit.kind, "%x", r, rows, "%K")
        w = pointers(f, "i8", "%w", o, columns, "%K")
        sums = [[f.variable(sums_kind, "zeroinitializer") for _ in w] for _ in x]
        more = [f.variable(sums_kind, "zeroinitializer") for _ in x]

        def add(k: str, n: int) -> None:
            of_w = [unit.matrix(f, f.at("i8", at, k), n) for at in w]
            for x_row, row, beyond in zip(x, sums, more):
                of_x = unit.inputs(f, f.at(unit.kind, x_row, k), n)
                f.put(sums_kind, unit.beyond(f, f.get(sums_kind, beyond), of_x), beyond)
                for each, at in zip(of_w, row):
                    f.put(sums_kind, unit.product(f, f.get(sums_kind, at), each, of_x), at)

        of_units = whole(f, "%K", unit.step)
        with f.loop("0", of_units, unit.step) as k:
            if rows == 1:
                _ask_for(f, w, k)
            add(k, unit.step)
        if unit.step > STEP:
            with f.loop(of_units, "%K", STEP) as k:
                add(k, STEP)
        return [
            f(f"sub {sums_kind} {f.get(sums_kind, at)}, {f.get(sums_kind, beyond)}")
            for row, beyond in zip(sums, more)
            for at in row
        ]

    return unit.intrinsics + _chunk(unit, ("x", "w", "y"), "i32", tile)


def int4_chunk(unit: Unit, group_size: int) -> str:
    """`chunk` of (x int8 [N, K], codes [M, K / 2] bytes, scale float32 [M, groups]) -> y float32 [N, M]."""
    n = unit.step if group_size % unit.step == 0 else STEP
    parts = range(0, group_size, n)
    sums_kind, kind = f"<{unit.lanes} x i32>", f"<{unit.lanes} x float>"

    def tile(f: Lines, r: str, o: str, rows: int, columns: int) -> list[str]:
        groups = f(f"udiv i64 %K, {group_size}")
        x = pointers(f, "i8", "%x", r, rows, "%K")
        codes = pointers(f, "i8", "%codes", o, columns, f("udiv i64 %K, 2"))
        scale = pointers(f, "float", "%scale", o, columns, groups)
        y = [[f.variable(kind, "zeroinitializer") for _ in codes] for _ in x]
        with f.loop("0", groups, 1) as g:
            k = f(f"mul i64 {g}, {group_size}")
            half = f(f"udiv i64 {k}, 2")
            if rows == 1:
                _ask_for(f, codes, half)
            of_codes = [
                [_codes(f, f.at("i8", at, half, str(i // 2)), n, unit.step) for i in parts] for at in codes
            ]
            scales = [everywhere(f, "float", f.read("float", at, g), unit.lanes) for at in scale]
            for x_row, row in zip(x, y):
                of_x = [_bytes(f, f.at("i8", x_row, k, str(i)), n, unit.step) for i in parts]
                beyond = unit.group(f, "zeroinitializer", [numbers("i8", [8] * unit.step)] * len(parts), of_x)
                begin = f(f"sub {sums_kind} zeroinitializer, {beyond}")
                for each, scaled, at in zip(of_codes, scales, row):
                    sums = f(f"sitofp {sums_kind} {unit.group(f, begin, each, of_x)} to {kind}")
                    terms = ", ".join(f"{kind} {x}" for x in (sums, scaled, f.get(kind, at)))
                    f.put(kind, f(f"call {kind} @llvm.fma.v{unit.lanes}f32({terms})"), at)
        return [f.get(kind, at) for row in y for at in row]

    declared = f"declare {kind} @llvm.fma.v{unit.lanes}f32({kind}, {kind}, {kind})\n"
    return unit.intrinsics + declared + _chunk(unit, ("x", "codes", "scale", "y"), "float", tile)


def _chunk(unit: Unit, names: tuple[str, ...], kind: str, tile: Callable[..., list[str]]) -> str:
    """Columns begin to end of y [N, M], BLOCK by BLOCK: for several rows at a time, then for fewer.

    names: of the call's arguments in their order, the first [N, K], and of its result. tile: the sums of a tile.
    """
    f = Lines()
    for i, name in enumerate(names):
        f.do(f"%{name} = call ptr @data(ptr %frame, i64 {i if i < len(names) - 1 else -1})")
    for name, argument, axis in (("N", -1, 0), ("M", -1, 1), ("K", 0, 1)):
        f.do(f"%{name} = call i64 @dim(ptr %frame, i64 {argument}, i64 {axis})")

    def across(begin: str, end: str, rows: int, r: str) -> None:
        for columns in (unit.columns, 1):
            last = f(f"add i64 {begin}, {whole(f, f(f'sub i64 {end}, {begin}'), columns)}")
            with f.loop(begin, last, columns) as o:
                to = [f.at(kind, at, o) for at in pointers(f, kind, "%y", r, rows, "%M")]
                _store(f, kind, unit.lanes, tile(f, r, o, rows, columns), to)
            begin = last

    with f.loop("%first", "%last", BLOCK) as block:
        until = f(f"call i64 @llvm.umin.i64(i64 {f(f'add i64 {block}, {BLOCK}')}, i64 %last)")
        first = "0"
        for rows in (unit.rows, 2, 1):
            last = f(f"add i64 {first}, {whole(f, f(f'sub i64 %N, {first}'), rows)}")
            with f.loop(first, last, rows) as r:
                across(block, until, rows, r)
            first = last
    return (
        "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)\n"
        f"define internal void @chunk(ptr %frame, i64 %first, i64 %last) {{\n{f}\n  ret void\n}}\n"
    )


def _ask_for(f: Lines, rows: list[str], k: str) -> None:
    """Has memory bring what lies 1 KB ahead."""
    for at in rows:
        f.do(f"call void @llvm.prefetch.p0(ptr {f.at('i8', at, k, '1024')}, i32 0, i32 3, i32 1)")


def _bytes(f: Lines, at: str, n: int, step: int) -> str:
    return _longer(f, f.read(f"<{n} x i8>", at), n, step)


def _codes(f: Lines, at: str, n: int, step: int) -> str:
    """The next n codes as bytes: those of a byte, the lower half first, as the bytes of an int16."""
    half = n // 2
    kind = f"<{half} x i16>"
    pairs = f(f"zext <{half} x i8> {f.read(f'<{half} x i8>', at)} to {kind}")
    moved = f(f"shl {kind} {pairs}, {numbers('i16', [4] * half)}")
    both = f(f"or {kind} {pairs}, {moved}")
    codes = f(f"and {kind} {both}, {numbers('i16', [0x0F0F] * half)}")
    return _longer(f, f(f"bitcast {kind} {codes} to <{n} x i8>"), n, step)


def _longer(f: Lines, vector: str, n: int, step: int) -> str:
    """With zeros up to `step`."""
    return vector if n == step else shuffle(f, "i8", n, vector, "zeroinitializer", range(step))


def _store(f: Lines, kind: str, lanes: int, sums: list[str], at: list[str]) -> None:
    """Adds up each vector of sums, and writes what they come to: an equal part of them, in order, to each of `at`.

    Halves are added until a number is left of each; the halves of two vectors make one, while there are two.
    """
    add = "add" if kind == "i32" else "fadd reassoc"
    of_each, in_all = lanes, len(sums)
    while of_each > 1:
        taken = min(2, len(sums))
        low = [i for i in range(taken * lanes) if i % of_each < of_each // 2]
        high = [i + of_each // 2 for i in low]
        halves = [[shuffle(f, kind, lanes, *pair, of) for of in (low, high)] for pair in _pairs(sums)]
        lanes = len(low)
        sums = [f(f"{add} <{lanes} x {kind}> {a}, {b}") for a, b in halves]
        of_each //= 2
    each = in_all // len(at)
    for i, to in enumerate(at):
        part = shuffle(f, kind, lanes, sums[0], "poison", range(i * each, i * each + each))
        f.do(f"store <{each} x {kind}> {part}, ptr {to}, align 4")


def _pairs(sums: list[str]) -> list[tuple[str, str]]:
    return list(zip(sums[::2], sums[1::2])) or [(sums[0], "poison")]
