"""Decoding beside transformers and llama.cpp: the same weights, prompts and cores, in one run.

    pip install 'lmx[peers]' && python scripts/bench_decode.py SmolLM2-135M-Instruct.gguf --out decode.json
    python scripts/bench_decode.py MODEL.gguf --peers /path/to/python    peers that live in another environment
    python scripts/bench_decode.py --preset 1b                           random weights and no peers, as on a GPU

What is measured, in tokens/s:

    prefill     a prompt of 512 tokens until its first new token
    decode      one row, 32 tokens of prompt, new tokens after the first
    decode x B  B rows with prompts of mixed lengths, 64 new tokens each after the first
    answer x B  twice as many questions as rows, of mixed lengths, each answered greedily in the model's chat format
                until it ends by itself or has 96 tokens. Counted are answers' tokens, the time is that of questions
                too. transformers answers B at a time and waits for the longest; lmx and llama.cpp give a finished
                row's place to the next question.

lmx computes in float32, and otherwise where --contenders asks for it: "lmx bfloat16", or one of FORMATS, in which all
matrices, embedding and head included, are quantized; transformers in float32 and bfloat16; llama.cpp reads files that
this script writes from the same weights, in F16 and Q8_0, or "llama.cpp Q4_1". Every contender is a process of its own
that stays alive and idle while others are measured, is warmed up on every shape, and is asked in turn, round after
round: medians are given. lmx must compile nothing after its warm-up, and this is checked.

The bandwidth is that of reading 1 GiB with all cores. A token at batch 1 reads every weight and its keys and values
once; those bytes times tokens/s over the bandwidth is the share of what this machine can do at all.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NEW = 96
PREFILL, DECODE = 512, 64
ASKS = (
    "Summarise in one sentence: {}", "Translate into Hindi: {}", "What is this about? {}", "Continue this text: {}",
    "इसे एक वाक्य में समझाइए: {}", "Is this true? Answer yes or no. {}", "Rewrite for a child: {}", "Name one word in: {}",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", help="a .gguf file with a chat template")
    parser.add_argument("--preset", help="random weights of this shape instead, in bfloat16")
    parser.add_argument("--peers", default=sys.executable, help="the Python that has torch and xllamacpp")
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 32, 128])
    parser.add_argument(
        "--contenders", nargs="*", default=["lmx float32", *PEERS], help="default: %(default)s"
    )
    parser.add_argument("--kinds", nargs="*", default=["decode", "answer"], help="of work in batches")
    parser.add_argument("--cache", default="float", help="float or int8: how lmx keeps keys and values")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="a JSON file of all figures")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        return work(asked.worker, json.loads(sys.stdin.readline()))
    if (asked.model is None) == (asked.preset is None):
        parser.error("give a .gguf file or --preset NAME")
    if asked.preset:
        return measure_preset(asked.preset)
    compare(asked)


FORMATS = {"int8": 1.0, "W8A8": 1.0, "int4": 0.5625, "W4A8": 0.5625}
"""Surgery of `lmx.adapt` -> bytes a weight, those of scales included."""
PEERS = ("transformers float32", "transformers bfloat16", "llama.cpp F16", "llama.cpp Q8_0")


def compare(asked) -> None:
    from bench_train import describe_machine

    with tempfile.TemporaryDirectory() as folder:
        job = prepare(asked, Path(folder))
        contenders = {name: Contender(name, job, asked.peers) for name in asked.contenders}
        times: dict[str, dict[str, list[float]]] = {}
        workloads = [f"{kind} x {B}" for kind in asked.kinds for B in asked.batches]
        workloads = ["prefill", "decode", *workloads]
        for workload in workloads:
            for i in range(asked.rounds + 1):
                for name, contender in contenders.items():
                    tokens, seconds = contender.run(workload if i else f"warm up: {workload}")
                    if i:  # the first is the warm-up
                        times.setdefault(workload, {}).setdefault(name, []).append(tokens / seconds)
                    print(f"{workload}, {name}: {tokens} tokens in {seconds:.2f} s", file=sys.stderr)
        for contender in contenders.values():
            contender.end()
        bandwidth = read_bandwidth()
        medians = {w: {n: statistics.median(x) for n, x in of.items()} for w, of in times.items()}
        about = describe_machine("jax") | {
            "peers": versions(asked.peers),
            "threads": str(asked.threads),
            "bandwidth": f"{bandwidth / 1e9:.1f} GB/s read",
        }
        for name, value in about.items():
            print(f"{name:12} {value}")
        show(medians, asked.contenders)
        for name, nbytes in job["bytes"].items():
            if name in medians["decode"]:
                share = nbytes * medians["decode"][name] / bandwidth
                print(f"{name}: {nbytes / 1e6:.0f} MB a token, {share:.0%} of the bandwidth at batch 1")
    if asked.out:
        asked.out.write_text(json.dumps({"about": about, "tokens_per_sec": times}, indent=1) + "\n")


def versions(python: str) -> str:
    """Of the peers, where they live."""
    names = ("torch", "transformers", "xllamacpp")
    ask = f"from importlib.metadata import version as v; print(*(f'{{n}} {{v(n)}},' for n in {names}))"
    found = subprocess.run([python, "-c", ask], capture_output=True, text=True)
    return found.stdout.strip().rstrip(",") or "none"


def show(medians, contenders) -> None:
    ours = contenders[0]
    print(f"\n{'tokens/s':24}" + "".join(f"{workload:>14}" for workload in medians))
    for name in contenders:
        row = [f"{of[name]:14,.1f}" for of in medians.values()]
        print(f"{name:24}" + "".join(row))
    print(f"\n{ours + ' is':24}" + "".join(f"{workload:>14}" for workload in medians))
    for name in contenders[1:]:
        print(f"{'x ' + name:24}" + "".join(f"{of[ours] / of[name]:13.2f}x" for of in medians.values()))


def prepare(asked, folder: Path) -> dict:
    """The job every worker is given: prompts as ids, and where the weights lie in its own format."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from lmx.models import pretrained

    found = pretrained.find(asked.model)
    tokenizer, template = found.tokenizer(), pretrained.chat(found.beside(), asked.model)
    words = re.sub(r"\s+", " ", (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")).split()
    prompts = []
    for i in range(2 * max(asked.batches, default=1)):
        start, n = 37 * i % (len(words) - 64), 3 + 23 * i % 60
        text = ASKS[i % len(ASKS)].format(" ".join(words[start : start + n]))
        prompts.append(template.ids(tokenizer, [{"role": "user", "content": text}]))
    job = {
        "model": str(asked.model.resolve()),
        "threads": asked.threads,
        "cache": asked.cache,
        "prompts": prompts,
        "long": tokenizer.encode(" ".join(words))[:PREFILL],
        "ends": list(tokenizer.end_ids),
        "context": PREFILL + NEW,
        "longest": max(map(len, prompts)) + NEW,
        "bytes": {},
    }
    n_params, kv = (
        sum(x.size for x in jax.tree.leaves(pretrained.shapes(found.config))),
        kv_bytes(found.config),
    )
    tokens = 32 + DECODE // 2
    for name in asked.contenders:
        widths = {"float32": 4, "bfloat16": 2, "F16": 2, "Q8_0": 34 / 32, "Q4_1": 20 / 32} | FORMATS
        width = widths[name.split()[-1]]
        of_kept = 2 if not name.startswith("lmx") else 1 if asked.cache == "int8" else 4
        job["bytes"][name] = width * n_params + of_kept * kv * tokens
    if any(name.startswith("transformers") for name in asked.contenders):
        job["folder"] = str(folder)
        pretrained.save(folder, found.config, pretrained.load(found), like=found.fields)
    for kind in ("F16", "Q8_0", "Q4_1"):
        if f"llama.cpp {kind}" in asked.contenders:
            job[kind] = str(folder / f"{kind}.gguf")
            write_gguf(asked.model, folder / f"{kind}.gguf", kind)
    return job


def kv_bytes(config) -> int:
    """Numbers that one token leaves in the cache."""
    a = config.attention
    return 2 * config.n_layers * a.kv_heads * a.width(config.d_model)


def write_gguf(source: Path, target: Path, kind: str) -> None:
    """The file again with its matrices in another type."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            types = field.types
            writer.add_key_value(name, field.contents(), types[0], types[-1] if len(types) > 1 else None)
    wanted = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        x = gguf.dequantize(tensor.data, tensor.tensor_type)
        if x.ndim > 1:
            x = gguf.quantize(x, wanted)
            writer.add_tensor(tensor.name, x, raw_dtype=wanted)
        else:
            writer.add_tensor(tensor.name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Contender:
    """A process that measures itself when it is told to."""

    def __init__(self, name: str, job: dict, peers: str):
        python = sys.executable if name.startswith("lmx") else peers
        command = [python, __file__, "--worker", name]
        threads = str(job["threads"])
        env = os.environ | {"OMP_NUM_THREADS": threads, "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self._name = name
        self._send(json.dumps(job))

    def run(self, workload: str) -> tuple[int, float]:
        self._send(workload)
        for line in self._process.stdout:
            if line.startswith("measured "):
                tokens, seconds = line.split()[1:]
                return int(tokens), float(seconds)
        sys.exit(f"bench_decode: {self._name} ended early; its message is above")

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _send(self, line: str) -> None:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


def work(name: str, job: dict) -> None:
    program, kind = name.split()
    runner = {"lmx": Lmx, "transformers": Transformers, "llama.cpp": LlamaCpp}[program](job, kind)
    for line in sys.stdin:
        workload = line.strip()
        warm_up, workload = workload.startswith("warm up"), workload.removeprefix("warm up: ")
        batch = int(workload.split()[-1]) if " x " in workload else 1
        few = warm_up and program != "lmx"  # which compiles nothing
        if workload == "prefill":
            tokens, seconds = len(job["long"]), runner.seconds([job["long"]], 1)
        elif workload.startswith("decode"):
            batch = -(-batch // 4) if few else batch
            prompts = [job["long"][:32]] if batch == 1 else job["prompts"][:batch]
            seconds = runner.seconds(prompts, 1 + DECODE) - runner.seconds(prompts, 1)
            tokens = DECODE * batch
        else:
            begin = time.perf_counter()
            tokens = runner.answer(job["prompts"][: batch // 4 if few else 2 * batch], batch)
            seconds = time.perf_counter() - begin
        print(f"measured {tokens} {seconds}", flush=True)


class Lmx:
    def __init__(self, job: dict, form: str):
        from dataclasses import replace

        import jax

        from lmx import adapt
        from lmx.generate import Sampling, completions, stream
        from lmx.models import build
        from lmx.run import trained

        model = trained(job["model"])
        dtype = form if form == "bfloat16" else "float32"
        built = build(replace(model.run.model, dtype=dtype))
        params = jax.tree.map(lambda x: x.astype(dtype), model.params) if dtype != "float32" else model.params
        if form in FORMATS:
            surgery = {"int8": adapt.Int8, "W8A8": adapt.W8A8, "int4": adapt.Int4, "W4A8": adapt.W4A8}[form]
            params = surgery(where=adapt.EVERY)(params, jax.random.key(0))
        model = model._replace(model=built, params=params).for_decoding(job["cache"])
        self._parts = model.model, model.params, model.tokenizer
        endless = model.tokenizer.without("eos_token").ending_with(())
        self._no_end = model.model, model.params, endless
        self._sampling, self._completions, self._stream = Sampling, completions, stream
        self._warm: set[int] = set()

    def seconds(self, prompts: list[list[int]], n: int) -> float:
        begin = time.perf_counter()
        found = dict(self._completions(*self._no_end, prompts, self._sampling(0.0, max_tokens=n)))
        assert all(len(completion.tokens) == n for completion in found.values())
        return time.perf_counter() - begin

    def answer(self, prompts: list[list[int]], batch: int) -> int:
        from lmx.generate.rows import _programs

        sampling, model = self._sampling(0.0, max_tokens=NEW), self._parts[0]
        before = [program._cache_size() for program in _programs(model)]
        found = dict(self._completions(*self._parts, prompts, sampling, batch_size=batch))
        after = [program._cache_size() for program in _programs(model)]
        if batch in self._warm and before != after:
            sys.exit(f"lmx compiled while it was measured: {before} programs before, {after} after")
        self._warm.add(batch)
        return sum(len(completion.tokens) for completion in found.values())


class Transformers:
    def __init__(self, job: dict, dtype: str):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(job["threads"])
        torch.set_grad_enabled(False)
        self._model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=getattr(torch, dtype))
        self._torch, self._ends = torch, job["ends"]

    def seconds(self, prompts: list[list[int]], n: int) -> float:
        begin = time.perf_counter()
        self._generate(prompts, max_new_tokens=n, min_new_tokens=n)
        return time.perf_counter() - begin

    def answer(self, prompts: list[list[int]], batch: int) -> int:
        total = 0
        for start in range(0, len(prompts), batch):
            for row in self._generate(prompts[start : start + batch], max_new_tokens=NEW).tolist():
                ended = [i for i, token in enumerate(row) if token in self._ends]
                total += ended[0] + 1 if ended else len(row)
        return total

    def _generate(self, prompts: list[list[int]], **more):
        """New tokens [B, n]; prompts are padded on the left."""
        longest = max(map(len, prompts))
        pad = self._ends[0]
        ids = self._torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        mask = self._torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        found = self._model.generate(
            ids, attention_mask=mask, do_sample=False, eos_token_id=self._ends, pad_token_id=pad, **more
        )
        return found[:, longest:]


class LlamaCpp:
    def __init__(self, job: dict, kind: str):
        self._job, self._file, self._server, self._rows = job, job[kind], None, 0

    def seconds(self, prompts: list[list[int]], n: int) -> float:
        self._with(len(prompts))
        begin = time.perf_counter()
        assert self._answers(prompts, n, ignore_eos=True) == n * len(prompts)
        return time.perf_counter() - begin

    def answer(self, prompts: list[list[int]], batch: int) -> int:
        self._with(batch)
        return self._answers(prompts, NEW)

    def _answers(self, prompts: list[list[int]], n: int, **more) -> int:
        """Tokens drawn in answer to all prompts, as many of them at once as the server has places."""
        with ThreadPoolExecutor(self._rows) as pool:
            return sum(pool.map(lambda prompt: self._ask(prompt, n, **more), prompts))

    def _with(self, rows: int) -> None:
        """The server for so many rows at once: it reads its file anew when their number changes."""
        import xllamacpp

        if self._rows != rows:
            self._server = None
            params = xllamacpp.CommonParams()
            params.model.path = self._file
            params.n_parallel, params.verbosity = rows, -1
            params.n_ctx = rows * (self._job["context"] if rows == 1 else self._job["longest"])
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self._job["threads"]
            self._server, self._rows = xllamacpp.Server(params), rows

    def _ask(self, prompt: list[int], n: int, **more) -> int:
        request = {"prompt": prompt, "n_predict": n, "temperature": 0, "cache_prompt": False}
        found = self._server.handle_completions(request | more)
        return found["usage"]["completion_tokens"]


def read_bandwidth(gib: int = 1, repeats: int = 5) -> float:
    """Bytes/s of reading memory once with all cores, the best of a few."""
    import numpy as np

    parts = np.array_split(np.ones(gib << 28, np.float32), os.cpu_count() or 1)
    best = 0.0
    for _ in range(repeats):
        threads = [threading.Thread(target=np.sum, args=(part,)) for part in parts]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - begin))
    return best


def measure_preset(name: str) -> None:
    """Decode at batch 1 with random weights in bfloat16, against the bandwidth of the device."""
    from dataclasses import replace

    import jax
    import jax.numpy as jnp
    from bench_train import describe_machine

    from lmx.data import Byte
    from lmx.generate import Sampling, generate
    from lmx.models import build, preset, unstacked

    config = replace(preset(name), dtype="bfloat16")
    model = build(config)
    draw = jax.jit(lambda key: jax.tree.map(lambda x: x.astype("bfloat16"), model.init(key)))
    params = draw(jax.random.key(0))
    nbytes = sum(x.nbytes for x in jax.tree.leaves(params)) - params["embed"].nbytes * (not config.tie_head)
    endless = Byte().train([""]).without("eos_token").ending_with(())

    def seconds(run) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    x, total = jnp.ones(2**28, jnp.float32), jax.jit(jnp.sum)
    bandwidth = x.nbytes / min(seconds(lambda: total(x).block_until_ready()) for _ in range(10))
    print(f"{describe_machine('jax')}, {jax.devices()[0].device_kind}; {bandwidth / 1e9:.0f} GB/s read")
    for form, tree in (("stacked", params), ("layer by layer", unstacked(params))):

        def write(n, tree=tree):
            generate(model, tree, endless, ["a" * 32], Sampling(0.0, max_tokens=n))

        times = [(seconds(lambda: write(1)), seconds(lambda: write(1 + DECODE))) for _ in range(6)]
        speed = DECODE / statistics.median(many - one for one, many in times[1:])
        share = nbytes * speed / bandwidth
        print(f"{name} {form}: {speed:.1f} tokens/s at batch 1, {share:.0%} of the bandwidth")


if __name__ == "__main__":
    main()
