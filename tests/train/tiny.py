"""A small training run in a process of its own, which tests may signal, kill, or starve of disk."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lmx.train.metrics import Sink

SENTENCES = ("the river carries {} boats past {} old mills", "नदी {} नावों को {} पुरानी चक्कियों के पास ले जाती है")
TIMED = ("first_step_seconds", "step_seconds", "tokens_per_sec", "mfu")
PRELOAD = [
    "lmx.train.standard",
    "lmx.train.checkpoint",
    "optax",
    "flax.linen",
    "jax.experimental.multihost_utils",
]


@dataclass(frozen=True)
class Job:
    """steps, save_every, eval_every, mesh: of the run. devices: of each process. seconds: added to each step.
    file_bytes: limit on the size of a file this process may write, in place of a full disk."""

    out: str
    cache: str
    steps: int = 12
    save_every: int = 3
    eval_every: int = 4
    mesh: tuple[int, int, int] = (1, 1, 1)
    devices: int = 1
    process: int = 0
    processes: int = 1
    port: int = 0
    seconds: float = 0.0
    file_bytes: int | None = None
    d_model: int = 32

    @property
    def log(self) -> Path:
        return Path(f"{self.out}.{self.process}.log")


class Disturb(Sink):
    """Takes its time with each step, so that a signal finds the run in the middle; limits file sizes then."""

    def __init__(self, job: Job):
        self.job = job

    def write(self, step, metrics):
        time.sleep(self.job.seconds)
        if self.job.file_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.job.file_bytes, self.job.file_bytes))


def plan(job: Job):
    import lmx

    lines = tuple(SENTENCES[i % 2].format(i, i * i % 97) for i in range(240))
    attention = lmx.nn.AttentionConfig(n_heads=4, n_kv_heads=2)
    model = lmx.models.TransformerConfig(
        d_model=job.d_model, n_layers=2, attention=attention, dtype="float32"
    )
    data = lmx.data.Data((lmx.data.Documents(lines),), valid_share=0.1, seq_len=32, batch_size=16)
    data_axis, fsdp, tensor = job.mesh
    return lmx.Run(
        model=model,
        data=data,
        optim=lmx.optim.AdamW(lr=1e-2),
        steps=job.steps,
        save_every=job.save_every,
        eval_every=job.eval_every,
        eval_batches=1,
        mesh=lmx.mesh.MeshConfig(data=data_axis, fsdp=fsdp, tensor=tensor),
    )


def train(job: Job) -> None:
    """The body of the process. Its output goes to `job.log`."""
    with open(job.log, "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    quick = "--xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={job.devices} {quick}"
    import jax

    import lmx
    import lmx.train.standard

    if job.processes > 1:
        jax.distributed.initialize(f"localhost:{job.port}", job.processes, job.process)
    session = lmx.train.session(plan(job), cache=job.cache)
    session.__dict__["program"] = session.program._replace(step=_noting_rows(session.program.step, job))
    result = lmx.train.standard.run(session, job.out, sinks=[Disturb(job)])
    print("finished" if not result.interrupted else "interrupted", "at step", result.step, flush=True)


def _noting_rows(step, job):
    """The same step, which also writes down a hash of each batch row that this process has on its devices."""
    notes = Path(f"{job.out}.rows.{job.process}.jsonl")

    def noted(state, batch):
        mine: dict[int, bytes] = {}
        for name in sorted(batch):
            held: dict[int, bytes] = {}
            for shard in batch[name].addressable_shards:
                for number, row in enumerate(np.asarray(shard.data), shard.index[0].start or 0):
                    assert held.setdefault(number, row.tobytes()) == row.tobytes()
            mine = {number: mine.get(number, b"") + row for number, row in held.items()}
        hashes = {number: hashlib.sha256(row).hexdigest()[:16] for number, row in mine.items()}
        with notes.open("a") as file:
            file.write(json.dumps({"step": int(state.step), "rows": hashes}) + "\n")
        return step(state, batch)

    return noted


class Runner:
    """Starts jobs from a process that has imported everything and started no backend, to save the imports."""

    def __init__(self, cache: str):
        self.cache = cache
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.running: list = []

    def start(self, job: Job):
        process = self.context.Process(target=train, args=(job,))
        process.start()
        self.running.append(process)
        return process

    def run(self, *jobs: Job, timeout: float = 300) -> None:
        """Runs jobs at the same time, each in all its processes, to exit codes of 0."""
        each = [replace(job, process=i) for job in jobs for i in range(job.processes)]
        for job, process in [(job, self.start(job)) for job in each]:
            process.join(timeout)
            assert process.exitcode == 0, f"exit code {process.exitcode}\n{tail(job)}"

    def close(self):
        for process in self.running:
            if process.is_alive():
                process.kill()
            process.join()


def tail(job: Job) -> str:
    return job.log.read_text(errors="replace")[-4000:] if job.log.exists() else "no log"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def state(out: str | Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Every array of a run's newest checkpoint, or of one step, by path."""
    import jax

    from lmx.train import stored
    from lmx.train.checkpoint import steps

    folder = Path(out) / "checkpoints"
    folder = folder / str(step or max(steps(folder)))
    assert stored.damage(folder) is None
    tree = stored.about(folder)["tree"]
    return stored.read(
        folder, {path: jax.ShapeDtypeStruct(shape, dtype) for path, (dtype, shape) in tree.items()}
    )


def metrics(out: str | Path) -> list[tuple[int, dict]]:
    """The lines of metrics.jsonl without the measured times."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [(x["step"], {k: v for k, v in x.items() if k != "step" and k not in TIMED}) for x in lines]


def rows(out: str | Path) -> dict[int, dict[int, str]]:
    """{step: {row of the global batch: hash}} over all processes and starts of a run, which must agree."""
    found: dict[int, dict[int, str]] = {}
    for path in Path(out).parent.glob(f"{Path(out).name}.rows.*.jsonl"):
        for line in path.read_text().splitlines():
            note = json.loads(line)
            batch = found.setdefault(note["step"], {})
            for row, digest in note["rows"].items():
                assert batch.setdefault(int(row), digest) == digest, (path.name, note["step"], row)
    return found


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert list(a) == list(b)
    differing = [p for p in a if a[p].dtype != b[p].dtype or a[p].tobytes() != b[p].tobytes()]
    assert not differing, differing
