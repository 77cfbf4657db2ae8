"""The CUDA C file on the CPU: each variant compiled once, called by ctypes."""

import ctypes
from functools import cache
from pathlib import Path

import numpy as np

try:
    import torch
except ImportError:
    torch = None

from . import build, threads
from .launch import NotCompiled

NAME = "host"
TAKES = "cpu"
SOURCE = Path(__file__).with_name("kernels.cu")
FLAGS = ("-O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -shared -fPIC "
         "-std=c++17")
NATIVE = "-march=native", "-mprefer-vector-width=512"  # and OpenMP
STORAGE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SMALL = 1 << 15  # elements below which one thread is faster than waking two


def macros(dtype, operands, draws, clips, sums=0, keys=False):
    """The definitions that choose a variant of kernels.cu."""
    return (f"-DSTORAGE={STORAGE[dtype]}",
            f"-DOPERANDS={operands}",
            f"-DDRAWS={int(draws)}",
            f"-DCLIP={int(clips)}",
            f"-DSUMS={sums}",
            f"-DKEYS={int(keys)}")


NOISE = macros("float32", 0, True, False)  # the smallest variant


@cache
def library(variant, flags, more=""):
    """kernels.cu and `more` source, compiled for a variant."""
    source = SOURCE.read_text() + more
    return build.library(source, *FLAGS.split(), *flags, *variant)


@cache
def _native():
    """(flags for this CPU, None), or (None, why nothing could be compiled).

    A compiler without OpenMP gives one thread.
    """
    reason = None
    for openmp in ("-fopenmp", "-fopenmp-simd"):
        flags = (*NATIVE, openmp)
        try:
            library(NOISE, flags)
            return flags, None
        except build.TooSlow as e:
            return None, str(e)
        except NotCompiled as e:
            reason = str(e)
    return None, reason


def native():
    """The flags for this CPU."""
    return _native()[0]


def why_not():
    """None, or why nothing could be compiled."""
    return _native()[1]


@cache
def _function(*variant):
    """(the function of a variant, None), or (None, why it could not be compiled)."""
    try:
        return library(macros(*variant), native()).minidiff_update, None
    except NotCompiled as e:
        return None, str(e)


def has_fma():
    """Whether the CPU has fused multiply-adds, as the compiler sees it."""
    return bool(library(NOISE, native()).minidiff_has_fma())


JOB = "out sums coef keys per_sample batch size seed sample step tag threads u0 u1 u2 u3"


class Job(ctypes.Structure):
    """struct Job of kernels.cu."""

    _fields_ = [(name, ctypes.c_uint64) for name in JOB.split()]


def prepare(launch):
    """run(step) of a `launch.Launch`, pointers looked up once.

    NotCompiled where this one cannot be compiled, such as on a full disk.
    """
    out, operands, coef = launch.out, launch.operands, launch.coef
    batch, size = out.shape
    function, reason = _function(*launch.variant())
    if reason:
        raise NotCompiled(reason)
    blocks = -(-size // 1024)  # of a row
    sums = np.empty((batch, blocks, *launch.sums()[1:])) if launch.result else None
    sums_at = sums.ctypes.data if launch.result else 0
    first_row = coef.data_ptr()
    u = [v.data_ptr() for v in operands]
    keys_at = 0 if launch.keys is None else launch.keys.data_ptr()
    job = Job(out.data_ptr(), sums_at, first_row, keys_at, launch.rows == "sample", batch,
              size, launch.seed, launch.sample, 0, launch.tag, 1, *u)
    given = ctypes.byref(job)

    def run(step):  # holds the launch, and so the memory that the job points to
        first_step = 0 if isinstance(step, int) else launch.first_step
        step = int(step)
        job.step = step + first_step
        if batch * size > SMALL:
            job.threads = threads.count()
        if launch.rows == "step":
            job.coef = first_row + 4 * coef.shape[1] * launch.row(step)
        function(given)
        return torch.from_numpy(sums.sum(1)) if launch.result else None
    return run
