"""The very training step, compiled for TPUs that are not here."""

import importlib.util
import math
import re
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmx import models, plan, tree
from lmx.cli import main
from lmx.data import Data
from lmx.mesh import MeshConfig
from lmx.models import TransformerConfig
from lmx.nn import AttentionConfig
from lmx.optim import Sgd
from lmx.run import Run
from lmx.train.program import batch_shapes, program

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed: pip install 'lmx[aot]'",
)
MODEL = TransformerConfig(
    vocab_size=512,
    d_model=256,
    n_layers=2,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2),
    dtype="bfloat16",
)
RUN = Run(model=MODEL, data=Data(seq_len=128, batch_size=8))
SHORT = Run(model=replace(MODEL, d_model=128, n_layers=8), data=Data(seq_len=64, batch_size=32), optim=Sgd())


def planned(run, topology):
    devices = plan.topology_devices(topology)
    mesh = run.mesh.build(devices)
    made = program(run, mesh)
    with plan.quick_compilation():
        arguments = made.shapes, batch_shapes(run, mesh)
        return made, plan.plan(made.step, arguments, topology, len(devices), 0.0)


@needs_libtpu
@pytest.mark.parametrize(
    "topology, mesh",
    [("v5e:2x2", MeshConfig(1, 2, 2)), ("v5p:2x2x1", MeshConfig(2, 2, 1)), ("v5e:1x1", MeshConfig())],
)
def test_the_step_and_its_attention_kernel_compile(topology, mesh):
    run = replace(RUN, mesh=mesh)
    made, found = planned(run, topology)
    assert found.fits and not found.problem
    assert found.kernels >= 3  # forward, gradient of queries, gradient of keys and values
    held = 0
    for x in jax.tree.leaves((made.shapes, batch_shapes(run, made.mesh))):
        held += x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
    assert held <= found.argument_bytes < 1.1 * held
    assert held < 16 * tree.count(made.shapes.params)
    assert found.temporary_bytes > 0 and found.argument_bytes <= found.peak_bytes < found.hbm_bytes


@needs_libtpu
def test_short_rows_take_no_kernel_and_memory_saved_is_seen():
    """Of 8 layers' activations remat keeps one, of 32 rows n_micro leaves 8; logits and gradients are the rest."""
    plain, saving = SHORT, replace(SHORT, model=replace(SHORT.model, remat="full"), n_micro=4)
    (_, before), (_, after) = (planned(run, "v5e:1x1") for run in (plain, saving))
    assert before.kernels == after.kernels == 0
    assert after.temporary_bytes < 0.6 * before.temporary_bytes


@needs_libtpu
def test_a_model_too_large_is_said_not_to_fit():
    large = replace(MODEL, d_model=8192, n_layers=8)
    _, found = planned(replace(RUN, model=large, data=Data(seq_len=128, batch_size=1)), "v5e:1x1")
    assert not found.fits and "exceeds available HBM" in found.problem
    assert (found.peak_bytes, found.hbm_bytes) == (0, 16 * 2**30)


@needs_libtpu
@pytest.mark.parametrize("name", plan.HBM_GIB)
def test_memory_sizes_are_those_of_the_compiler(name):
    """An array of 256 GiB fits nowhere; the compiler then says what there is, less what it keeps for itself."""
    topology = f"{name}:2x2" if name in ("v2", "v3", "v5e", "v6e") else f"{name}:2x2x1"
    mesh = MeshConfig().build(plan.topology_devices(topology))
    x = jax.ShapeDtypeStruct((2**28, 256), jnp.float32, sharding=NamedSharding(mesh, P()))
    found = plan.plan(jax.jit(lambda x: x + 1.0), (x,), topology, 4, 0.0)
    available = float(re.search(r"available HBM \(([\d.]+)G\)", found.problem)[1])
    assert abs(found.hbm_bytes / 2**30 - available) < 1.3
    assert not found.fits


@needs_libtpu
def test_other_failures_of_the_compiler_are_not_called_memory():
    """A Pallas kernel whose blocks break the rules of the hardware."""
    from jax.experimental import pallas as pl

    mesh = MeshConfig().build(plan.topology_devices("v5e:1x1"))
    x = jax.ShapeDtypeStruct((64, 100), jnp.float32, sharding=NamedSharding(mesh, P()))

    def kernel(x, y):
        y[...] = x[...]

    block = pl.BlockSpec((3, 7), lambda i, j: (i, j))
    call = pl.pallas_call(kernel, grid=(2, 2), in_specs=[block], out_specs=block, out_shape=x)
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError)):
        plan.plan(jax.jit(call), (x,), "v5e:1x1", 1, 0.0)


@needs_libtpu
@pytest.mark.parametrize(
    "topology, told",
    [
        ("v5e", "write a generation and a shape, such as v5e:4x4"),
        ("v7x:2x2x1", "write a generation and a shape"),
        ("tpu v5e:2x2", "write a generation and a shape"),
        ("v5e:3x3", "'v5e:3x3' is not known to libtpu: .*try v5e:2x2 or v5p:2x2x1"),
        ("v9:2x2", "'v9:2x2' is not known to libtpu"),
    ],
)
def test_a_topology_that_is_none_is_told(topology, told):
    with pytest.raises(ValueError, match=told):
        plan.topology_devices(topology)


def test_without_libtpu_the_way_to_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ImportError, match=r"needs libtpu: pip install 'lmx\[aot\]'"):
        plan.topology_devices("v5e:2x2")


EXPERIMENT = """
import lmx
from lmx.models import TransformerConfig

def base():
    return lmx.Run(model=TransformerConfig(d_model=128, n_layers=1, dtype="bfloat16"),
                   data=lmx.data.Data(("nothing/is/read.txt",), seq_len=128, batch_size=8))
"""


@needs_libtpu
def test_the_command_says_what_a_chip_needs(tmp_path, capsys):
    file = tmp_path / "experiment.py"
    file.write_text(EXPERIMENT)
    main(["plan", str(file), "--topology", "v5e:2x2", "--set", "mesh.fsdp=2"])
    told = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["mesh"] == "data=2, fsdp=2, tensor=1" and told["fits"] == "yes"
    assert int(told["fused kernels"]) >= 3
    run = replace(
        RUN, model=replace(MODEL, vocab_size=259, d_model=128, n_layers=1, attention=AttentionConfig())
    )
    assert float(told["FLOPs per step"]) == pytest.approx(
        8 * 128 * models.flops_per_token(run.model, 128), rel=0.01
    )


@needs_libtpu
@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--set", "data.batch_size=6"], "batch_size=6 does not split into n_micro=1 x 4 devices"),
        (["--set", "mesh.data=3"], "does not fill 4 devices"),
        (["--set", "mesh.pmap=true"], "--set mesh.pmap=false plans the same step"),
        (["--set", "data.tokenizer=Char()"], "--set model.vocab_size=N"),
        (["--preset", "1b"], "one of the two"),
    ],
)
def test_the_command_tells_mistakes_in_one_line(tmp_path, capsys, arguments, told):
    file = tmp_path / "experiment.py"
    file.write_text(EXPERIMENT)
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(file), "--topology", "v5e:2x2", *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and told in error and error.count("\n") == 1


@needs_libtpu
def test_the_command_fails_where_the_model_does_not_fit(tmp_path, capsys):
    file = tmp_path / "experiment.py"
    file.write_text(EXPERIMENT)
    settings = ("model.d_model=16384", "model.attention.n_heads=64", "data.batch_size=1")
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(file), "--topology", "v5e:1x1", *(x for s in settings for x in ("--set", s))])
    assert ended.value.code == 1
    assert "NO: Ran out of memory" in capsys.readouterr().out
