"""The CUDA C file on the CPU: compiled once by the system's C++ compiler, called by ctypes."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

NAME, TAKES = "host", "cpu"
SOURCE = Path(__file__).with_name("kernels.cu")
FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC",
         "-std=c++17")
NATIVE = "-march=native", "-mprefer-vector-width=512", "-fopenmp"
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
SMALL = 1 << 15  # elements below which one thread is faster than waking two


class Job(ctypes.Structure):
    """`struct Job` of kernels.cu."""

    _fields_ = [("out", ctypes.c_void_p), ("u", ctypes.c_void_p * 4), ("sums", ctypes.c_void_p),
                ("coef", ctypes.c_void_p),
                *((n, ctypes.c_int64) for n in ("per_sample", "operands", "draws", "clips",
                                                "batch", "size")),
                ("seed", ctypes.c_uint64),
                *((n, ctypes.c_int64) for n in ("sample", "step", "tag", "threads"))]


def compiler():
    """The C++ compiler's path: $CXX, c++, g++ or clang++; None without one."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++",
                                                "clang++"))), None)


def _cpu():
    """What -march=native means here, for the cache's key."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


@cache
def library(flags=NATIVE):
    """The compiled library; cached under $XDG_CACHE_HOME/minidiff by source, flags and CPU."""
    cxx = compiler()
    if not cxx:
        raise RuntimeError("no C++ compiler found: install g++ or clang++, or set CXX")
    key = hashlib.sha256("\0".join((SOURCE.read_text(), cxx, *FLAGS, *flags, _cpu())).encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "minidiff"
    built = folder / f"host-{key.hexdigest()[:24]}.so"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as f:
            part = f.name
        try:
            subprocess.run([cxx, *FLAGS, *flags, "-x", "c++", SOURCE, "-o", part], check=True,
                           capture_output=True, text=True)
            os.replace(part, built)  # whole or not at all, also between two processes
        finally:
            Path(part).unlink(missing_ok=True)
    lib = ctypes.CDLL(str(built))
    lib.minidiff_update.argtypes = [ctypes.POINTER(Job), ctypes.c_int]
    lib.minidiff_words.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] + [ctypes.c_uint32] * 2
    lib.minidiff_update.restype = lib.minidiff_words.restype = None
    return lib


@cache
def missing():
    """None, or why nothing could be compiled; a compiler without OpenMP gives one thread."""
    global NATIVE
    reason = "no C++ compiler found: install g++ or clang++, or set CXX"
    for flags in (NATIVE, tuple(f for f in NATIVE if f != "-fopenmp")) if compiler() else ():
        try:
            library(flags)
            NATIVE = flags
            return None
        except subprocess.CalledProcessError as e:
            reason = f"{e.cmd[0]} failed on kernels.cu: {e.stderr.strip().splitlines()[:1]}"
        except OSError as e:
            reason = f"could not build or load kernels.cu: {e}"
    return reason


@cache
def threads():
    """Cores this process may use; OMP_NUM_THREADS overrides."""
    mine = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or len(mine)


def _pointer(array):
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()


def update(out, operands, coef, draws, clips, shape, seed, sample, step, tag, sums=False,
           flags=None):
    """See on_numpy.update. coef: float32 NumPy (rows, width)."""
    per_sample = len(coef) > 1
    if isinstance(step, np.ndarray) or hasattr(step, "data_ptr"):
        step, per_sample = int(step), False
        coef = coef[max(0, min(step, len(coef) - 1))]
    batch, size = shape
    partial = np.empty((batch, -(-size // 1024))) if sums else None  # a block is 1024 elements
    job = Job(None if out is None else _pointer(out),
              (ctypes.c_void_p * 4)(*map(_pointer, operands)),
              partial.ctypes.data if sums else None, coef.ctypes.data, per_sample, len(operands),
              draws, clips, batch, size, seed & (1 << 64) - 1, sample, step, tag,
              threads() if batch * size > SMALL else 1)
    dtype = (operands or [out])[0].dtype
    library(flags or NATIVE).minidiff_update(job, DTYPES[str(dtype).removeprefix("torch.")])
    return partial.sum(1) if sums else None
