import contextlib
import errno
import importlib.util
import json
import math
import struct
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.plan import topology_devices
from lmx.report import read_metrics
from lmx.train.metrics import JsonLines, Meter, Sink, TensorBoard, Wandb


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def fill(path, last):
    lines = JsonLines(path)
    for step in range(1, last + 1):
        lines.write(step, {"loss": 10.0 / step})
        if step % 5 == 0:
            lines.write(step, {"valid/loss": 11.0 / step})
    lines.close()


class TestJsonLines:
    def test_each_write_is_a_whole_line_at_once(self, tmp_path):
        path = tmp_path / "run" / "metrics.jsonl"
        lines = JsonLines(path)
        for step in range(1, 4):
            lines.write(step, {"loss": np.float32(step), "हानि": 0.5, "tokens": 512})
            assert steps_of(path) == list(range(1, step + 1))
        lines.close()
        assert '{"step": 1, "loss": 1.0, "हानि": 0.5, "tokens": 512}\n' in path.read_text(encoding="utf-8")

    def test_what_json_cannot_write_comes_back_from_the_report(self, tmp_path):
        lines = JsonLines(tmp_path / "metrics.jsonl")
        lines.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
        lines.close()
        assert '"NaN", "b": "Infinity", "c": "-Infinity"' in (tmp_path / "metrics.jsonl").read_text()
        found = read_metrics(tmp_path)
        assert (
            math.isnan(found["a"][0][1]) and found["b"] == [(1, math.inf)] and found["c"] == [(1, -math.inf)]
        )

    @given(killed=st.integers(1, 30), saved=st.integers(0, 30), cut=st.integers(0, 40))
    def test_killed_anywhere_and_resumed_no_step_is_missing_or_doubled(
        self, tmp_path_factory, killed, saved, cut
    ):
        saved = min(saved, killed)
        folder = tmp_path_factory.mktemp("run")
        path, whole = folder / "metrics.jsonl", folder / "whole.jsonl"
        fill(whole, 30)
        fill(path, killed)
        with path.open("ab") as file:
            file.write(b'{"step": 31, "loss": 0.123, "lr": 0.1234}'[:cut])
        lines = JsonLines(path)
        lines.rewind(saved)
        for step in range(saved + 1, 31):
            lines.write(step, {"loss": 10.0 / step})
            if step % 5 == 0:
                lines.write(step, {"valid/loss": 11.0 / step})
        lines.close()
        assert path.read_text() == whole.read_text()
        assert sorted(p.name for p in folder.iterdir()) == ["metrics.jsonl", "whole.jsonl"]

    def test_a_process_killed_while_it_writes_leaves_whole_lines(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        code = f"""
            from lmx.train.metrics import JsonLines
            lines = JsonLines({str(path)!r})
            for step in range(1, 10**9):
                lines.write(step, {{"loss": 1.0 / step}})
                if step == 1000:
                    print("going", flush=True)
        """
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout.readline() == "going\n"
        child.kill()
        child.wait()
        lines = JsonLines(path)
        found = steps_of(path)
        assert found == list(range(1, len(found) + 1)) and len(found) >= 1000
        lines.rewind(700)
        lines.write(701, {})
        lines.close()
        assert steps_of(path) == list(range(1, 702))

    @pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b"\0" * 5000, b"x" * 200_000, b""])
    def test_a_half_line_is_dropped_when_the_file_is_opened(self, tmp_path, tail):
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail)
        lines = JsonLines(path)
        lines.write(3, {})
        lines.close()
        assert steps_of(path) == [1, 2, 3]

    def test_a_line_that_is_no_record_is_named_and_nothing_is_lost(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\nhello\n{"step": 3}\n')
        lines = JsonLines(path)
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
            lines.rewind(1)
        lines.write(4, {})
        lines.close()
        assert path.read_text() == '{"step": 1}\nhello\n{"step": 3}\n{"step": 4}\n'

    @pytest.mark.skipif(sys.platform == "win32", reason="resource limits are POSIX")
    def test_where_no_more_fits_the_error_names_the_file_and_lines_stay_whole(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        code = f"""
            import resource
            from lmx.train.metrics import JsonLines
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            lines = JsonLines({str(path)!r})
            try:
                for step in range(1, 100):
                    lines.write(step, {{"loss": 1.0}})
            except OSError as error:
                print(step, error.errno, error, sep="|")
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            lines.write(step, {{"loss": 1.0}})
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
        )
        step, number, message = done.stdout.strip().split("|")
        assert int(number) == errno.EFBIG
        assert str(path) in message and f"step {step}" in message and "resume" in message
        assert steps_of(path) == list(range(1, int(step) + 1)) and 1000 // 30 < int(step) < 1000 // 20

    def test_a_folder_that_cannot_be_made_is_an_error_at_once(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError):
            JsonLines(tmp_path / "file" / "metrics.jsonl")


def read_events(folder):
    """(step, {tag: value}, session status) of every TensorBoard event, from its record framing."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            yield event.step, {v.tag: v.simple_value for v in event.summary.value}, event.session_log.status
            data = data[16 + length :]


class TestTensorBoard:
    def test_scalars_arrive_and_a_resume_hides_the_steps_run_again(self, tmp_path):
        board = TensorBoard(tmp_path)
        for step in (1, 2, 3):
            board.write(step, {"loss": 4.0 - step, "valid/loss": 0.5})
        board.rewind(2)
        board.write(3, {"loss": 9.0})
        board.close()
        events = list(read_events(tmp_path))
        assert [(s, v["loss"]) for s, v, _ in events if "loss" in v] == [
            (1, 3.0),
            (2, 2.0),
            (3, 1.0),
            (3, 9.0),
        ]
        assert [step for step, _, status in events if status == 1] == [3]

    def test_closing_one_that_was_never_written_makes_no_file(self, tmp_path):
        TensorBoard(tmp_path / "tb").close()
        assert not (tmp_path / "tb").exists()


class TestWandb:
    @pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
    def test_a_run_is_kept_offline(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WANDB_SILENT", "true")
        sink = Wandb(
            "lmx", name="small", config={"optim.lr": 1e-3, "model": None}, mode="offline", folder=tmp_path
        )
        sink.write(1, {"loss": 2.0})
        sink.write(2, {"loss": 1.5})
        sink.write(3, {"lr": 0.1})
        assert sink.run.summary["loss"] == 1.5 and sink.run.config["optim.lr"] == 1e-3
        sink.close()
        assert list(tmp_path.rglob("*.wandb"))

    @pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
    def test_without_wandb_the_error_says_what_to_install(self):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'lmx\[wandb\]'"):
            Wandb("lmx")


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self):
        return self.now


class TestMeter:
    def test_the_first_step_is_told_apart_and_never_averaged(self):
        clock = Clock()
        meter = Meter(512, clock=clock)
        clock.now += 60.0
        assert meter.tick(1) == {"first_step_seconds": 60.0}
        for step in range(2, 6):
            clock.now += 0.25
            assert meter.tick(step) == {"tokens_per_sec": 2048.0, "step_seconds": 0.25}

    def test_the_window_forgets(self):
        clock = Clock()
        meter = Meter(100, window=4, clock=clock)
        for step in range(1, 20):
            clock.now += 1.0 if step < 10 else 0.5
            rates = meter.tick(step)
        assert rates["tokens_per_sec"] == 200.0

    def test_time_away_counts_nowhere(self):
        clock = Clock()
        meter = Meter(100, clock=clock)
        meter.tick(1)
        for step in range(2, 9):
            meter.pause()
            clock.now += 1000.0
            meter.resume()
            clock.now += 1.0
            assert meter.tick(step)["step_seconds"] == 1.0
        with pytest.raises(RuntimeError, match="not paused"):
            meter.resume()

    def test_a_resumed_run_starts_at_any_step(self):
        clock = Clock()
        meter = Meter(100, clock=clock)
        meter.tick(501)
        clock.now += 2.0
        assert meter.tick(502)["tokens_per_sec"] == 50.0

    def test_two_ticks_at_one_instant_give_no_rate(self):
        meter = Meter(100, clock=Clock())
        meter.tick(1)
        assert meter.tick(2) == {}

    def test_mfu_is_the_share_of_the_peaks_of_all_devices(self):
        pytest.importorskip("libtpu")
        devices = np.array(topology_devices("v5e:2x2"))
        clock = Clock()
        meter = Meter(1000, 197e9, jax.sharding.Mesh(devices, ("data",)), clock=clock)
        meter.tick(1)
        clock.now += 1.0
        assert meter.tick(2)["mfu"] == pytest.approx(0.25)

    def test_on_a_cpu_there_is_no_mfu(self):
        clock = Clock()
        meter = Meter(1000, 1e9, jax.sharding.Mesh(np.array(jax.devices()), ("data",)), clock=clock)
        meter.tick(1)
        clock.now += 1.0
        assert set(meter.tick(2)) == {"tokens_per_sec", "step_seconds"}


def test_the_base_sink_takes_everything_and_keeps_nothing(tmp_path):
    with contextlib.closing(Sink()) as sink:
        sink.rewind(0)
        sink.write(1, {"loss": 1.0})
        sink.flush()
    assert list(tmp_path.iterdir()) == []
