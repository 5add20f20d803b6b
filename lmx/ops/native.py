"""Functions in LLVM's own language, called from XLA programs on a CPU and shared among XLA's threads.

XLA:CPU has no fast form of some products. What is written here instead is compiled by llvmlite in about 0.1 s, when
a program that needs it is traced, for the CPU that runs; XLA calls it as a typed foreign function (`jax.ffi`). The
words of a call frame and of the API table are those of xla/ffi/api/c_api.h, major version 0.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import platform
import sys
import threading
from pathlib import Path
from string import Template

import jax

CHUNKS = 8
"""Chunks per thread: a thread that the machine slows leaves the rest of its share to others."""
SMALLEST = 32
"""Columns of a chunk at least, so that small products are not split at all."""
_engines = {}
"""Name -> what owns the compiled code, which XLA may call as long as the process lives."""
_one_at_a_time = threading.Lock()


def available() -> bool:
    """Whether functions can be compiled and run here: Linux on x86 with AVX2 and FMA, and llvmlite installed."""
    return (
        sys.platform == "linux"
        and platform.machine() == "x86_64"
        and {"avx2", "fma"} <= cpu_flags()
        and importlib.util.find_spec("llvmlite") is not None
    )


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What this machine's CPU can do, in the words of /proc/cpuinfo; nothing where there is no such file."""
    cpuinfo = Path("/proc/cpuinfo")
    return flags_in(cpuinfo.read_text()) if cpuinfo.exists() else frozenset()


def flags_in(cpuinfo: str) -> frozenset[str]:
    """The flags (x86) or features (Arm) of the text of a /proc/cpuinfo."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return frozenset(
        flag for name, _, value in lines if name.strip() in ("flags", "Features") for flag in value.split()
    )


def register(name: str, chunk: str, axis: int = 1, smallest: int = SMALLEST) -> str:
    """Compiles a function and makes it a target of `jax.ffi.ffi_call` on CPU, under the name that is returned.

    chunk: LLVM IR of `@chunk(ptr %frame, i64 %begin, i64 %end)`, which writes what lies at begin to end of an axis of
    its first result; `@data` and `@dim` read the frame. Several threads call it at once. smallest: what one is given
    of that axis at the least. A name is compiled once, however many threads ask for it.
    """
    with _one_at_a_time:
        if name not in _engines:
            _engines[name] = _compiled(name, chunk, axis, smallest)
    return name


def _compiled(name: str, chunk: str, axis: int, smallest: int):
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    threads = len(os.sched_getaffinity(0))
    shared = Template(_SHARED).substitute(
        helpers=threads - 1,
        parts=CHUNKS * threads,
        round=CHUNKS * threads - 1,
        smallest=smallest,
        axis=axis,
    )
    module = llvm.parse_assembly(shared + chunk)
    module.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    address = ctypes.c_void_p(engine.get_function_address("handler"))
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(address), platform="cpu")
    return engine


_SHARED = """
declare ptr @malloc(i64)
declare void @free(ptr)
declare i32 @sched_yield()
declare i64 @llvm.umin.i64(i64, i64)
declare i64 @llvm.umax.i64(i64, i64)

; Word i of the memory at p.
define internal i64 @word(ptr %p, i64 %i) alwaysinline {
  %at = getelementptr i64, ptr %p, i64 %i
  %value = load i64, ptr %at
  ret i64 %value
}
define internal ptr @pointer(ptr %p, i64 %i) alwaysinline {
  %value = call i64 @word(ptr %p, i64 %i)
  %pointer = inttoptr i64 %value to ptr
  ret ptr %pointer
}
define internal void @put(ptr %p, i64 %i, i64 %value) alwaysinline {
  %at = getelementptr i64, ptr %p, i64 %i
  store i64 %value, ptr %at
  ret void
}

; XLA_FFI_CallFrame: 1 extension, 2 api, 3 context, 9 arguments, 14 results. XLA_FFI_Buffer: 3 data, 5 dims.
define internal ptr @buffer(ptr %frame, i64 %i) alwaysinline {
  %result = icmp slt i64 %i, 0        ; argument i from 0; -1 is the first result, -2 the second
  %at = select i1 %result, i64 14, i64 9
  %number = xor i64 %i, -1
  %index = select i1 %result, i64 %number, i64 %i
  %list = call ptr @pointer(ptr %frame, i64 %at)
  %buffer = call ptr @pointer(ptr %list, i64 %index)
  ret ptr %buffer
}
define internal ptr @data(ptr %frame, i64 %i) alwaysinline {
  %buffer = call ptr @buffer(ptr %frame, i64 %i)
  %data = call ptr @pointer(ptr %buffer, i64 3)
  ret ptr %data
}
define internal i64 @dim(ptr %frame, i64 %i, i64 %axis) alwaysinline {
  %buffer = call ptr @buffer(ptr %frame, i64 %i)
  %dims = call ptr @pointer(ptr %buffer, i64 5)
  %dim = call i64 @word(ptr %dims, i64 %axis)
  ret i64 %dim
}

; A job: 0 the next chunk, 1 chunks done, 2 threads that may still look at it, 3 chunks, 4 columns of a chunk, 5 frame.
; A thread that starts late finds no chunk left and touches the job alone, which the last to leave frees.
define internal void @work(ptr %job) {
  %chunks = call i64 @word(ptr %job, i64 3)
  %size = call i64 @word(ptr %job, i64 4)
  %done = getelementptr i64, ptr %job, i64 1
  br label %take
take:
  %i = atomicrmw add ptr %job, i64 1 monotonic
  %some = icmp ult i64 %i, %chunks
  br i1 %some, label %do, label %leave
do:
  %frame = call ptr @pointer(ptr %job, i64 5)
  %M = call i64 @dim(ptr %frame, i64 -1, i64 $axis)
  %begin = mul i64 %i, %size
  %until = add i64 %begin, %size
  %end = call i64 @llvm.umin.i64(i64 %until, i64 %M)
  call void @chunk(ptr %frame, i64 %begin, i64 %end)
  atomicrmw add ptr %done, i64 1 release
  br label %take
leave:
  call void @leave(ptr %job)
  ret void
}
define internal void @leave(ptr %job) {
  %threads = getelementptr i64, ptr %job, i64 2
  %before = atomicrmw sub ptr %threads, i64 1 acq_rel
  %last = icmp eq i64 %before, 1
  br i1 %last, label %drop, label %end
drop:
  call void @free(ptr %job)
  br label %end
end:
  ret void
}

define ptr @handler(ptr %frame) {
  %extension = call ptr @pointer(ptr %frame, i64 1)
  %asks = icmp ne ptr %extension, null
  br i1 %asks, label %answer, label %run
answer:                               ; XLA asks which version this was written for: 0.3
  %metadata = call ptr @pointer(ptr %extension, i64 3)
  call void @put(ptr %metadata, i64 3, i64 12884901888)
  ret ptr null
run:
  %M = call i64 @dim(ptr %frame, i64 -1, i64 $axis)
  %above = add i64 %M, $round
  %share = udiv i64 %above, $parts
  %size = call i64 @llvm.umax.i64(i64 %share, i64 $smallest)
  %up = add i64 %M, %size
  %rounded = sub i64 %up, 1
  %chunks = udiv i64 %rounded, %size
  %others = sub i64 %chunks, 1
  %helpers = call i64 @llvm.umin.i64(i64 %others, i64 $helpers)
  %threads = add i64 %helpers, 2      ; the helpers, this thread at work, and this thread waiting
  %job = call ptr @malloc(i64 48)
  %job.word = ptrtoint ptr %job to i64
  %frame.word = ptrtoint ptr %frame to i64
  call void @put(ptr %job, i64 0, i64 0)
  call void @put(ptr %job, i64 1, i64 0)
  call void @put(ptr %job, i64 2, i64 %threads)
  call void @put(ptr %job, i64 3, i64 %chunks)
  call void @put(ptr %job, i64 4, i64 %size)
  call void @put(ptr %job, i64 5, i64 %frame.word)
  %api = call ptr @pointer(ptr %frame, i64 2)
  %schedule = call ptr @pointer(ptr %api, i64 17)
  %destroy = call ptr @pointer(ptr %api, i64 8)
  %context = call i64 @word(ptr %frame, i64 3)
  %work = ptrtoint ptr @work to i64
  %call = alloca [5 x i64]            ; XLA_FFI_ThreadPool_Schedule_Args
  call void @put(ptr %call, i64 0, i64 40)
  call void @put(ptr %call, i64 1, i64 0)
  call void @put(ptr %call, i64 2, i64 %context)
  call void @put(ptr %call, i64 3, i64 %work)
  call void @put(ptr %call, i64 4, i64 %job.word)
  %failed = alloca [3 x i64]          ; XLA_FFI_Error_Destroy_Args
  call void @put(ptr %failed, i64 0, i64 24)
  call void @put(ptr %failed, i64 1, i64 0)
  br label %helper
helper:
  %n = phi i64 [ 0, %run ], [ %n.next, %asked ], [ %n.next, %alone ]
  %n.next = add i64 %n, 1
  %enough = icmp eq i64 %n, %helpers
  br i1 %enough, label %begin, label %ask
ask:
  %error = call ptr %schedule(ptr %call)
  %none = icmp eq ptr %error, null
  br i1 %none, label %asked, label %alone
asked:
  br label %helper
alone:                                ; no thread pool: this thread does the work
  %error.word = ptrtoint ptr %error to i64
  call void @put(ptr %failed, i64 2, i64 %error.word)
  call void %destroy(ptr %failed)
  call void @leave(ptr %job)
  br label %helper
begin:
  call void @work(ptr %job)
  %done = getelementptr i64, ptr %job, i64 1
  br label %wait
wait:                                 ; only for chunks that other threads are at work on
  %count = load atomic i64, ptr %done acquire, align 8
  %all = icmp eq i64 %count, %chunks
  br i1 %all, label %finish, label %yield
yield:
  call i32 @sched_yield()
  br label %wait
finish:
  call void @leave(ptr %job)
  ret ptr null
}
"""
