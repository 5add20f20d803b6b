"""Every fused path against the reference, forward and gradient; memory, limits and the choice."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against_reference import CAUSAL, EPS, WINDOW, assert_equal_to_reference, draw, qkv
from hypothesis import given
from hypothesis import strategies as st

from lmx.ops.attention import attention
from lmx.ops.blockwise import blockwise
from lmx.ops.flash import IMPLEMENTATIONS, choose, cudnn, obstacle, pick, splash
from lmx.ops.kept import kept
from lmx.ops.mask import Causal, Full, PrefixLM, SameSegment, SlidingWindow, Where
from lmx.ops.position import T5, ALiBi


def packed(B, T):
    """Segments of 5/8 and 1/4 of the row, then padding; the second row is one segment."""
    ids = np.ones((B, T), np.int32)
    ids[0, 5 * T // 8 :] = 2
    ids[0, 7 * T // 8 :] = 0
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    positions[0, 5 * T // 8 :] -= 5 * T // 8
    return Where(jnp.asarray(np.where(ids == 0, 0, positions)), jnp.asarray(ids))


# ------------------------------------------------ equal to the reference


@pytest.mark.parametrize("dtype", sorted(EPS))
@pytest.mark.parametrize("path", [kept, partial(blockwise, block=16)], ids=["cpu", "blockwise"])
@pytest.mark.parametrize(
    "mask, K, softcap",
    [(CAUSAL, 4, None), (WINDOW, 2, 2.0), (PrefixLM(6) & SameSegment(), 1, None), (Full(), 2, None)],
)
def test_paths_that_run_anywhere(path, mask, K, softcap, dtype):
    """T = 40 is two and a half blocks of 16; row 0 holds two segments and padding."""
    where = packed(2, 40)
    args = qkv(2, 40, 4, K, 8, dtype)
    rule = {"q_where": where, "k_where": where, "mask": mask, "softcap": softcap, "scale": 0.3}
    assert_equal_to_reference(path, args, dtype, **rule)


@pytest.mark.parametrize("path", [kept, partial(blockwise, block=16)], ids=["cpu", "blockwise"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("position", [ALiBi(), T5(8, 20)])
def test_biased_paths_and_the_gradient_of_the_table(path, position, softcap):
    where = packed(2, 40)
    weights = {name: draw(5, *shape) for name, (shape, _) in position.weights(32, 4).items()}

    def make_bias(w):
        return partial(position.bias, n_heads=4, w=w)

    rule = {"q_where": where, "k_where": where, "mask": CAUSAL, "softcap": softcap}
    assert_equal_to_reference(path, (*qkv(2, 40, 4, 2, 8), weights), make_bias=make_bias, **rule)


@pytest.mark.parametrize("path", [kept, partial(blockwise, block=16)], ids=["cpu", "blockwise"])
def test_queries_over_a_longer_cache(path):
    """5 queries at the end of 20 tokens that stand in shuffled slots of a cache of 33."""
    slots = np.random.default_rng(0).permutation(33)[:20]
    k_where = Where(
        jnp.zeros((2, 33), jnp.int32).at[:, slots].set(jnp.arange(20, dtype=jnp.int32)[None]),
        jnp.zeros((2, 33), jnp.int32).at[:, slots].set(1),
    )
    q_where = Where(jnp.tile(jnp.arange(15, 20, dtype=jnp.int32)[None], (2, 1)), jnp.ones((2, 5), jnp.int32))
    rule = {"q_where": q_where, "k_where": k_where, "mask": CAUSAL}
    assert_equal_to_reference(path, qkv(2, 5, 4, 2, 8, S=33), **rule)


@pytest.mark.parametrize("path", [kept, partial(blockwise, block=16)], ids=["cpu", "blockwise"])
def test_inside_scan_remat_and_vmap(path):
    where = packed(2, 40)
    rule = {"q_where": where, "k_where": where, "mask": CAUSAL}
    q, k, v = qkv(2, 40, 4, 2, 8)
    table = {"table": draw(5, 8, 4)}

    def loss(f, q, k, v, table):
        @partial(jax.checkpoint, prevent_cse=False)
        def layer(x, _):
            return x + f(x, k, v, bias=partial(T5(8, 20).bias, n_heads=4, w=table), **rule), None

        return jnp.sum(jnp.sin(jax.lax.scan(layer, q, None, length=2)[0]))

    got, expected = (
        jax.jit(jax.grad(partial(loss, f), (0, 1, 2, 3)))(q, k, v, table) for f in (path, attention)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, atol=64 * EPS["float32"] * float(jnp.abs(b).max()))
    stack = jnp.stack([q, -q])
    mapped = jax.vmap(lambda q: path(q, k, v, **rule))(stack)
    np.testing.assert_allclose(mapped[1], path(-q, k, v, **rule), atol=32 * EPS["float32"])


@pytest.mark.parametrize("dtype", sorted(EPS))
@pytest.mark.parametrize(
    "mask", [CAUSAL, WINDOW, PrefixLM(6) & SameSegment(), Full() & SameSegment()], ids=repr
)
def test_cudnn_path_by_xla(mask, dtype):
    """cuDNN runs on NVIDIA alone; the same call with XLA's implementation of jax.nn.dot_product_attention."""
    where = packed(2, 40)
    rule = {"q_where": where, "k_where": where, "mask": mask, "scale": 0.3}
    with jax.numpy_dtype_promotion("standard"):  # jax's own code mixes dtypes there
        assert_equal_to_reference(
            partial(cudnn, implementation="xla"), qkv(2, 40, 4, 2, 8, dtype), dtype, **rule
        )


@pytest.mark.parametrize(
    "mask, T, K, softcap, dtype",
    [
        (CAUSAL, 256, 2, None, "float32"),
        (SlidingWindow(50) & SameSegment(), 200, 1, 2.0, "float32"),
        (Full() & SameSegment(), 128, 4, None, "bfloat16"),
    ],
)
def test_splash_interpreted(mask, T, K, softcap, dtype):
    where = packed(2, T)
    rule = {"q_where": where, "k_where": where, "mask": mask, "softcap": softcap, "scale": 0.3}
    assert_equal_to_reference(partial(splash, interpret=True), qkv(2, T, 4, K, 64, dtype), dtype, **rule)


def test_blockwise_memory_grows_with_the_length_alone():
    """Temporary bytes of the gradients, by the compiler: the reference holds N T S scores, blockwise not."""

    def temp_bytes(f, T):
        def loss(q, k, v, positions):
            where = Where(positions, jnp.ones_like(positions))
            return f(q, k, v, q_where=where, k_where=where, mask=CAUSAL).sum()

        x, positions = (
            jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32),
            jax.ShapeDtypeStruct((1, T), jnp.int32),
        )
        program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, positions).compile()
        return program.memory_analysis().temp_size_in_bytes

    scores = 2 * 4096 * 4096 * 4
    ours = temp_bytes(partial(blockwise, block=128), 4096)
    assert temp_bytes(attention, 4096) >= scores
    assert ours < scores / 20
    assert temp_bytes(partial(blockwise, block=128), 8192) < 2.5 * ours


# ------------------------------------------------ on a mesh


@pytest.mark.parametrize("impl", ["auto", "cpu", "blockwise", "reference"])
@pytest.mark.parametrize("K", [1, 2])
def test_on_a_mesh_of_eight(impl, K):
    """Rows over data and fsdp, heads over tensor; with K = 1 both tensor devices get the one head."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    where = packed(4, 40)
    rule = {"q_where": where, "k_where": where, "mask": CAUSAL}
    assert_equal_to_reference(pick(impl, platform="cpu", mesh=mesh), qkv(4, 40, 4, K, 8), **rule)


def test_bias_on_a_mesh():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    where = packed(4, 40)

    def make_bias(w):
        return partial(T5(8, 20).bias, n_heads=4, w=w)

    rule = {"q_where": where, "k_where": where, "mask": CAUSAL}
    args = (*qkv(4, 40, 4, 2, 8), {"table": draw(5, 8, 4)})
    assert_equal_to_reference(pick("blockwise", platform="cpu", mesh=mesh), args, make_bias=make_bias, **rule)


# ------------------------------------------------ limits and choice


def shapes(B=8, T=256, N=4, K=2, H=64, dtype="bfloat16", S=None):
    return jax.ShapeDtypeStruct((B, T, N, H), dtype), jax.ShapeDtypeStruct((B, S or T, K, H), dtype)


PLAIN = {"mask": CAUSAL, "bias": None, "softcap": None, "mesh": None}


@pytest.mark.parametrize(
    "impl, words, rule, dims",
    [
        ("splash", "takes no bias", {"bias": ALiBi().bias}, {}),
        ("splash", "has no mask", {"mask": PrefixLM(3) & SameSegment()}, {}),
        ("splash", "needs & SameSegment", {"mask": Causal()}, {}),
        ("cudnn", "takes no bias", {"bias": ALiBi().bias}, {}),
        ("cudnn", "softcap=30.0", {"softcap": 30.0}, {}),
        ("cudnn", "not in float32", {}, {"dtype": "float32"}),
        ("cudnn", "not 256", {}, {"H": 256}),
        ("cudnn", "not 20", {}, {"H": 20}),
        ("cudnn", "even lengths", {}, {"T": 129}),
    ],
)
def test_a_named_path_says_what_it_cannot_express(impl, words, rule, dims):
    q, k = shapes(**dims)
    where = packed(*q.shape[:2])
    rule = {"mask": CAUSAL, **rule}

    def call(q, k):
        return pick(impl, platform="gpu")(q, k, k, q_where=where, k_where=where, **rule)

    with pytest.raises(ValueError, match=f'impl="{impl}".*{words}.*; use "blockwise" or "auto"'):
        jax.eval_shape(call, q, k)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(
            lambda q, k: IMPLEMENTATIONS[impl](q, k, k, q_where=where, k_where=where, **rule), q, k
        )


def test_splash_says_when_a_mesh_does_not_divide():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    for dims, words in (({"B": 6}, "6 rows over 4"), ({"N": 3, "K": 1}, "3 query and 1 key")):
        q, k = shapes(**dims)
        assert words in obstacle("splash", q, k, **{**PLAIN, "mesh": mesh})
        assert choose("tpu", q, k, **{**PLAIN, "mesh": mesh}) != "splash"


def test_unknown_names_are_listed():
    with pytest.raises(
        ValueError, match="'flash' is none of auto, reference, cpu, one_query, blockwise, cudnn, splash"
    ):
        pick("flash", platform="cpu")


@pytest.mark.parametrize(
    "platform, rule, dims, name",
    [
        ("cpu", {}, {}, "cpu"),
        ("cpu", {"bias": ALiBi().bias, "softcap": 5.0}, {}, "cpu"),
        ("cpu", {}, {"T": 4096}, "blockwise"),
        ("gpu", {}, {}, "cudnn"),
        ("cuda", {}, {"T": 4096}, "cudnn"),
        ("gpu", {}, {"dtype": "float32"}, "reference"),
        ("gpu", {"softcap": 5.0}, {"T": 4096}, "blockwise"),
        ("gpu", {"mask": PrefixLM(5) & SameSegment()}, {}, "cudnn"),
        ("tpu", {}, {}, "splash"),
        ("tpu", {"softcap": 5.0}, {"T": 4096}, "splash"),
        ("tpu", {"mask": PrefixLM(5) & SameSegment()}, {"T": 4096}, "blockwise"),
        ("tpu", {}, {"T": 2}, "reference"),
        ("tpu", {}, {"T": 1, "S": 4096}, "reference"),
        ("cpu", {}, {"T": 4096, "S": 8192}, "blockwise"),
    ],
)
def test_auto_chooses_by_platform_and_shape(platform, rule, dims, name):
    q, k = shapes(**dims)
    assert choose(platform, q, k, **{**PLAIN, **rule}) == name


@given(
    platform=st.sampled_from(["cpu", "gpu", "cuda", "tpu"]),
    mask=st.sampled_from([CAUSAL, WINDOW, PrefixLM(3) & SameSegment(), Full(), Causal()]),
    bias=st.sampled_from([None, ALiBi().bias]),
    softcap=st.sampled_from([None, 5.0]),
    T=st.sampled_from([1, 2, 127, 128, 300, 1024, 4096]),
    S=st.sampled_from([None, 1024]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    H=st.sampled_from([12, 64, 256]),
)
def test_auto_never_meets_an_obstacle(platform, mask, bias, softcap, T, S, dtype, H):
    q, k = shapes(T=T, S=S, dtype=dtype, H=H)
    rule = {"mask": mask, "bias": bias, "softcap": softcap, "mesh": None}
    assert obstacle(choose(platform, q, k, **rule), q, k, **rule) is None


def test_a_named_path_leaves_cache_steps_to_the_reference():
    """A splash model can decode: a step over a cache has fewer queries than keys."""
    q, k, v = qkv(1, 1, 4, 2, 8, S=20)
    q_where = Where(jnp.full((1, 1), 9, jnp.int32), jnp.ones((1, 1), jnp.int32))
    k_where = Where(
        jnp.arange(20, dtype=jnp.int32)[None], (jnp.arange(20, dtype=jnp.int32) < 10).astype(jnp.int32)[None]
    )
    rule = {"q_where": q_where, "k_where": k_where, "mask": CAUSAL}
    np.testing.assert_array_equal(pick("splash", platform="tpu")(q, k, v, **rule), attention(q, k, v, **rule))


# ------------------------------------------------ lowered for machines that are not here


def training_program(platform, mesh=None, impl="auto", mask=CAUSAL, softcap=20.0):
    attend = pick(impl, platform=platform, mesh=mesh)

    def loss(q, k, v, positions, segment_ids):
        where = Where(positions, segment_ids)
        out = attend(q, k, v, q_where=where, k_where=where, mask=mask, softcap=softcap)
        return out.astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2)))


def abstract(place=lambda *spec: None, B=8, T=512, H=64, dtype="bfloat16"):
    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place(*spec))

    rows = ("data", "fsdp")
    q = array((B, T, 4, H), dtype, rows, None, "tensor", None)
    k = array((B, T, 2, H), dtype, rows, None, "tensor", None)
    where = array((B, T), "int32", rows, None)
    return q, k, k, where, where


def test_tpu_program_calls_the_kernels():
    """Forward, dq and dkv kernels, lowered on this CPU host without libtpu; no CPU barrier slips in."""
    program = jax.export.export(training_program("tpu"), platforms=["tpu"])(*abstract()).mlir_module()
    assert program.count("tpu_custom_call") == 3
    assert "optimization_barrier" not in program


@pytest.mark.parametrize("impl", ["blockwise", "cpu", "reference"])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_other_paths_lower_without_barriers(impl, platform):
    program = jax.export.export(training_program(platform, impl=impl), platforms=[platform])(*abstract())
    assert "optimization_barrier" not in program.mlir_module()


@pytest.mark.parametrize(
    "mask, kind, window",
    [
        (CAUSAL, "CAUSAL", 0),
        (SlidingWindow(50) & SameSegment(), "CAUSAL", 50),
        (PrefixLM(5) & SameSegment(), "NO_MASK", 0),
    ],
)
def test_cuda_program_calls_cudnn(mask, kind, window):
    """Lowered for CUDA where jax's CUDA packages are installed, with or without a GPU."""
    names = ("__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward")
    known = [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
    lower = jax.export.export(
        training_program("gpu", impl="cudnn", mask=mask, softcap=None),
        platforms=["cuda"],
        disabled_checks=known,
    )
    try:
        program = lower(*abstract()).mlir_module()
    except RuntimeError as error:
        if "cuDNN is not detected" in str(error):
            pytest.skip("jax[cuda] is not installed")
        raise
    config = program.replace("\\22", '"')
    assert all(f"@{name}(" in program for name in names)
    assert config.count(f'"mask_type": "{kind}"') == 2
    assert config.count(f'"sliding_window_length": {window}') == 2


@pytest.mark.filterwarnings(
    "ignore:Error reading persistent compilation cache"
)  # written for TPU, unreadable here
@pytest.mark.parametrize("dtype, H", [("bfloat16", 64), ("bfloat16", 128), ("float32", 64)])
def test_compiles_for_four_tpu_chips(dtype, H, monkeypatch):
    """Ahead of time for a v5e 2x2 slice by libtpu, which checks tiles and on-chip memory."""
    pytest.importorskip("libtpu")
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        monkeypatch.setenv(name, value)
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = jax.sharding.Mesh(np.array(devices).reshape(1, 2, 2), ("data", "fsdp", "tensor"))

    def place(*spec):
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    lowered = training_program("tpu", mesh).lower(*abstract(place, dtype=dtype, H=H))
    assert lowered.compile().as_text().count("tpu_custom_call") >= 3
