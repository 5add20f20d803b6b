"""Checkpoints of a small tree: bits, holes, meshes, damage, full disks, permissions, ancestry."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import tempfile
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx import artifact
from lmx.train import stored
from lmx.train.checkpoint import Checkpoints, best_step, load_params
from lmx.weights import Weight, leaf, static


@leaf
class Packed(Weight):
    q: Any
    scale: Any
    bits: int = static(default=8)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    step: Any
    trainable: Any
    frozen: Any
    constants: Any
    opt_state: Any
    key: Any


def make(seed=0, width=16):
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.normal(size=(2, 8, width)), jnp.float32)
    packed = Packed(
        jnp.asarray(rng.integers(-8, 8, (8, width)), jnp.int8), jnp.ones((1, width), jnp.bfloat16)
    )
    trainable = {"blocks": {"q": {"w": w}, "k": {"w": None}}, "norm": {"scale": jnp.ones((8,))}}
    frozen = {"blocks": {"q": {"w": None}, "k": {"w": packed}}, "norm": {"scale": None}}
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3)), optax.identity()
    )
    opt_state = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape)).astype(x.dtype), tx.init(trainable)
    )
    key = jax.random.key_data(jax.random.key(seed))
    odd = {"int4": jnp.ones((4,), jnp.int4), "none": jnp.zeros((0, 3)), "yes": jnp.ones((2,), bool)}
    return State(
        jnp.int32(seed), trainable, frozen | {"odd": odd}, {"teacher": jnp.ones((4,))}, opt_state, key
    )


def same(a, b):
    """Equal structure, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes(), path


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def saved(folder, *steps, **settings):
    found = Checkpoints(folder, **settings)
    for step in steps:
        found.save(step, make(step), {"position": step})
    found.close()
    return found


def test_holes_nodes_and_every_dtype_survive_bit_for_bit(tmp_path):
    state = make(3)
    here = saved(tmp_path, 3)
    assert here.steps() == [3] and here.latest() == 3 and here.failed == 0
    restored, meta = Checkpoints(tmp_path).restore(shapes(state))
    assert meta == {"position": 3}
    assert isinstance(restored.constants["teacher"], jax.ShapeDtypeStruct)
    same(restored.__class__(**{**vars(restored), "constants": state.constants}), state)
    assert isinstance(restored.frozen["blocks"]["k"]["w"], Packed)


def test_donating_the_state_right_after_a_save_does_not_change_what_is_written(tmp_path):
    update = jax.jit(lambda x: jax.tree.map(lambda y: y * 2 + 1, x), donate_argnums=0)
    tree = {"w": jnp.arange(2_000_000, dtype=jnp.float32), "b": jnp.ones((8,))}
    expected = jax.tree.map(lambda x: np.array(x, copy=True), tree)
    here = Checkpoints(tmp_path)
    here.save(1, tree, {})
    for _ in range(20):
        tree = update(tree)
    jax.block_until_ready(tree)
    here.close()
    same(here.restore(shapes(expected))[0], expected)


@pytest.mark.parametrize(
    "before, after", [((8, 1), (2, 4)), ((2, 4), (8, 1)), ((4, 2), None), (None, (4, 2))]
)
def test_restores_onto_another_mesh(tmp_path, before, after):
    def placed(shape):
        if shape is None:
            return jax.sharding.SingleDeviceSharding(jax.devices()[0])
        mesh = jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
        return NamedSharding(mesh, P("fsdp", "tensor"))

    values = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    here = Checkpoints(tmp_path)
    here.save(1, {"w": jax.device_put(values, placed(before))}, {})
    like = {"w": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=placed(after))}
    found = here.restore(like)[0]["w"]
    assert found.sharding == placed(after)
    assert np.asarray(found).tobytes() == values.tobytes()


def test_keeps_the_last_and_the_best(tmp_path):
    here = Checkpoints(tmp_path, keep=2)
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: None, 6: 1.5}
    for step, loss in losses.items():
        here.save(step, {"w": jnp.ones(3)}, {}, None if loss is None else {"valid/loss": loss})
    here.close()
    assert here.steps() == [2, 5, 6] and here.best_step() == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "5", "6"]


def test_the_best_may_be_the_most(tmp_path):
    here = Checkpoints(tmp_path, keep=1, best="-valid/accuracy")
    for step, accuracy in {1: 0.5, 2: 0.9, 3: 0.7, 4: float("nan"), 5: 0.8}.items():
        here.save(step, {"w": jnp.full(3, step)}, {}, {"valid/accuracy": accuracy, "valid/loss": step})
    here.close()
    assert here.steps() == [2, 5] and here.best_step() == 2 and here.lowest() == -0.9
    assert stored.about(tmp_path / "2")["best"] == "-valid/accuracy" and best_step(tmp_path) == 2


def test_artifact_names_content_and_ancestors(tmp_path):
    text = tmp_path / "corpus.txt"
    text.write_text("some words")
    saved(tmp_path / "run", 1, made_from=[text])
    resumed = Checkpoints(tmp_path / "run", made_from=[text])
    resumed.restore(shapes(make(1)))
    resumed.save(2, make(2), {})
    resumed.close()
    first, second = (artifact.read(tmp_path / "run" / str(step)) for step in (1, 2))
    assert first.kind == "checkpoint" and first.hash == artifact.hash_path(tmp_path / "run" / "1")
    assert first.path == str(tmp_path / "run" / "1")
    assert [p.hash for p in first.made_from] == [artifact.hash_path(text)]
    assert [p.hash for p in second.made_from] == [artifact.hash_path(text), first.hash]


@pytest.mark.parametrize("step", [1, "latest", "best"])
def test_load_params_joins_trainable_and_frozen(tmp_path, step):
    plain = {
        "trainable": {"a": {"w": jnp.ones((2, 3))}, "b": None},
        "frozen": {"a": {"w": None}, "b": jnp.zeros(4)},
    }
    here = Checkpoints(tmp_path / "checkpoints")
    here.save(1, plain | {"opt_state": (jnp.ones(2), ())}, {}, {"valid/loss": 1.0})
    here.close()
    found = load_params(tmp_path, step=step)
    assert found["a"]["w"].shape == (2, 3) and found["b"].tolist() == [0, 0, 0, 0]
    same(load_params(tmp_path / "checkpoints" / "1", like=shapes(found)), found)
    with pytest.raises(ValueError, match=r"a/w is float32\[2, 3\] there, float32\[2, 4\] here"):
        load_params(tmp_path, like={"a": {"w": jnp.ones((2, 4))}, "b": jnp.zeros(4)})


def test_load_params_fills_weight_nodes(tmp_path):
    saved(tmp_path, 1)
    state = make(1)
    params = {
        "blocks": {"q": state.trainable["blocks"]["q"], "k": state.frozen["blocks"]["k"]},
        "norm": state.trainable["norm"],
        "odd": state.frozen["odd"],
    }
    same(load_params(tmp_path, like=shapes(params)), params)


def test_another_shape_is_an_error_that_names_the_paths(tmp_path):
    saved(tmp_path, 1)
    with pytest.raises(
        ValueError, match=r"trainable/blocks/q/w is float32\[2, 8, 16\] there, float32\[2, 8, 24\]"
    ):
        Checkpoints(tmp_path).restore(shapes(make(1, width=24)))
    bigger = shapes(make(1))
    bigger.trainable["norm"]["bias"] = jax.ShapeDtypeStruct((8,), jnp.float32)
    with pytest.raises(ValueError, match=r"trainable/norm/bias is missing there, float32\[8\] here"):
        Checkpoints(tmp_path).restore(bigger)
    other = shapes(make(1))
    other.trainable["norm"]["scale"] = jax.ShapeDtypeStruct((8,), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"norm/scale is float32\[8\] there, bfloat16\[8\] here"):
        Checkpoints(tmp_path).restore(other)
    assert Checkpoints(tmp_path).steps() == [1]


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "remove":
        path.unlink()
    elif how == "flip":
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])


@pytest.mark.parametrize("how", ["truncate", "empty", "remove", "flip"])
@pytest.mark.parametrize("which", ["largest", "meta.json", "_METADATA", "artifact.json"])
def test_damage_to_the_newest_is_found_and_the_one_before_restored(tmp_path, how, which):
    saved(tmp_path, 1, 2)
    files = [p for p in (tmp_path / "2").rglob("*") if p.is_file()]
    chosen = max(files, key=lambda p: p.stat().st_size)
    spoil(chosen if which == "largest" else next(p for p in files if p.name == which), how)
    here = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match=r"/2: .*set aside and the one before it restored"):
        restored, meta = here.restore(make(0))
    assert meta == {"position": 1} and int(restored.step) == 1
    assert [p.name.rsplit(".", 1)[0] for p in tmp_path.iterdir() if "damaged" in p.name] == ["2.damaged"]
    here.save(2, make(2), {"position": 2})
    here.close()
    same(Checkpoints(tmp_path).restore(make(0))[0].trainable, make(2).trainable)


def test_nothing_whole_is_a_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint here"):
        Checkpoints(tmp_path).restore(make())
    saved(tmp_path, 1)
    (tmp_path / "1" / "meta.json").unlink()
    with pytest.raises(ValueError, match=r"1: .*meta.json.*restore another of the steps \[1\]"):
        Checkpoints(tmp_path).restore(make(), step=1)
    with pytest.raises(ValueError, match=r"meta\.json"):
        load_params(tmp_path)
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"no whole checkpoint is left; damaged: 1\.damaged"),
    ):
        Checkpoints(tmp_path).restore(make())
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 7"):
        Checkpoints(tmp_path).restore(make(), step=7)


def test_a_checkpoint_from_a_stranger_cannot_lead_out_of_its_folder(tmp_path):
    saved(tmp_path, 1)
    shutil.move(tmp_path / "1" / "meta.json", tmp_path / "elsewhere.json")
    (tmp_path / "1" / "meta.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match=r"symbolic link meta\.json"):
        load_params(tmp_path)
    (tmp_path / "1" / "meta.json").unlink()
    about = json.loads((tmp_path / "elsewhere.json").read_text())
    about["tree"]["trainable/../../x"] = ["float32", [2]]
    (tmp_path / "1" / "meta.json").write_text(json.dumps(about))
    artifact.record(tmp_path / "1", "checkpoint", facts={"step": 1, "files": stored.sizes(tmp_path / "1")})
    with pytest.raises(ValueError, match=r"'trainable/../../x' .*is not an array of a checkpoint"):
        load_params(tmp_path)


def test_what_is_not_an_array_is_an_error_at_once(tmp_path):
    here = Checkpoints(tmp_path)
    with pytest.raises(TypeError, match="name is 'x', not an array"):
        here.save(1, {"name": "x"}, {})
    with pytest.raises(TypeError, match="key is a typed random key"):
        here.save(1, {"key": jax.random.key(0)}, {})
    with pytest.raises(TypeError, match="JSON"):
        here.save(1, {"w": jnp.ones(2)}, {"when": object()})
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)
    assert here.steps() == []


def test_going_back_to_an_older_step_sets_the_newer_ones_aside(tmp_path):
    saved(tmp_path, 1, 2, 3)
    here = Checkpoints(tmp_path)
    here.restore(make(), step=1)
    here.save(2, make(5), {"position": 2})
    here.close()
    assert here.steps() == [1, 2]
    assert sorted(p.name[:7] for p in tmp_path.glob("*.aside.*")) == ["2.aside", "3.aside"]
    same(here.restore(make())[0].trainable, make(5).trainable)


def test_a_step_already_saved_is_not_written_again(tmp_path):
    here = saved(tmp_path, 1)
    before = (tmp_path / "1").stat().st_mtime_ns, artifact.read(tmp_path / "1").hash
    here.save(1, make(1), {})
    here.close()
    assert ((tmp_path / "1").stat().st_mtime_ns, artifact.read(tmp_path / "1").hash) == before


def big(n):
    """Random, so that compression cannot shrink it: n MiB."""
    return {"w": jnp.asarray(np.random.default_rng(n).integers(0, 2**32, n * 2**18, dtype=np.uint32))}


def full_disk_story(folder):
    """Saves 1 (fits), 2 (does not), then 3 (fits again); 1 and 3 must be there, and restore."""
    here = Checkpoints(folder)
    here.save(1, big(1), {"position": 1})
    here.save(2, big(24), {"position": 2})
    with pytest.warns(
        UserWarning, match=r"the checkpoint of step 2 .* was not saved: .*the last one saved is 1"
    ):
        here.wait()
    assert here.failed == 1 and "step 2" in here.problem and here.steps() == [1]
    same(here.restore(shapes(big(1)))[0], big(1))
    here.save(3, big(2), {"position": 3})
    here.close()
    assert here.problem is None and here.steps() == [1, 3]
    assert sorted(os.listdir(folder)) == ["1", "3"]
    same(here.restore(shapes(big(2)))[0], big(2))


def test_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "lmx-test", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root; test_file_size_limit covers the unprivileged case")
    try:
        full_disk_story(disk / "checkpoints")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_file_size_limit(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 2**20, before[1]))
    try:
        full_disk_story(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_save_raises_when_strict(tmp_path):
    here = Checkpoints(tmp_path / "run", strict=True)
    here.save(1, make(1), {})
    here.wait()
    shutil.move(tmp_path / "run", tmp_path / "gone")
    with pytest.raises(OSError, match=r"step 2 .* was not saved"):
        here.save(2, make(2), {})


def test_no_permission_is_an_error_before_the_first_step(tmp_path, readonly):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=r"file: checkpoints cannot be written here .*give a folder"):
        Checkpoints(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="cannot be written here"):
        Checkpoints(tmp_path / "file" / "run")
    refused = pytest.raises(
        PermissionError, match=r"checkpoints cannot be written here \(Permission denied\); give"
    )
    with refused, nobody(readonly):
        Checkpoints(readonly / "run")


def test_reading_needs_no_permission_to_write(readonly):
    readonly.chmod(0o755)
    saved(readonly / "run", 1)
    with nobody(readonly, readonly / "run"):
        assert set(load_params(readonly / "run", like=None)) == {"blocks", "norm", "odd"}


@pytest.fixture
def readonly():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        Path(folder).chmod(0o755)


@contextlib.contextmanager
def nobody(*folders):
    """Without the right to write to these folders: root, who may write anywhere, becomes another user."""
    modes = {folder: folder.stat().st_mode for folder in folders}
    for folder in folders:
        folder.chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)
        for folder, mode in modes.items():
            folder.chmod(mode)


def test_left_over_partial_saves_are_removed_at_the_start(tmp_path):
    saved(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "2.partial")
    here = Checkpoints(tmp_path)
    assert here.steps() == [1] and not (tmp_path / "2.partial").exists()


def test_training_is_not_held_up_by_the_write(tmp_path):
    """The write of 64 MiB goes on after `save` returned, in a thread of its own."""
    here = Checkpoints(tmp_path)
    here.save(1, big(64), {})
    assert any(t.name == "checkpoint 1" and t.is_alive() for t in threading.enumerate())
    assert here.steps() == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        here.close()
    assert here.steps() == [1]
