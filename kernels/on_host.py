"""The CUDA C file on the CPU: each variant compiled once by the C++ compiler, called by ctypes."""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

try:
    import torch
except ImportError:
    torch = None

from . import threads

NAME, TAKES = "host", "cpu"
SOURCE = Path(__file__).with_name("kernels.cu")
FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC",
         "-std=c++17")
NATIVE = "-march=native", "-mprefer-vector-width=512", "-fopenmp"
STORAGE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SMALL = 1 << 15  # elements below which one thread is faster than waking two


def macros(dtype, operands, draws, clips, sums=0):
    """The definitions that choose a variant of kernels.cu."""
    return (f"-DSTORAGE={STORAGE[dtype]}", f"-DOPERANDS={operands}", f"-DDRAWS={int(draws)}",
            f"-DCLIP={int(clips)}", f"-DSUMS={sums}")


def compiler():
    """The C++ compiler's path: $CXX, c++, g++ or clang++; None without one."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++",
                                                "clang++"))), None)


@cache
def _cpu():
    """What -march=native means here, for the cache's key."""
    info = Path("/proc/cpuinfo")
    found = re.search("(?m)^(flags|Features).*", info.read_text() if info.exists() else "")
    return found[0] if found else platform.processor()


@cache
def _folder():
    """$XDG_CACHE_HOME/minidiff, or where that cannot be written a folder of this process."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "minidiff"
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    except (OSError, RuntimeError):
        _folder.private = tempfile.TemporaryDirectory(prefix="minidiff-")
        return Path(_folder.private.name)


@cache
def library(variant, flags, more=""):
    """kernels.cu and `more` source compiled; cached by source, flags and CPU."""
    source, command = SOURCE.read_text() + more, [compiler(), *FLAGS, *flags, *variant]
    key = hashlib.sha256("\0".join((source, *command, _cpu())).encode()).hexdigest()
    built = _folder() / f"host-{key[:24]}.so"
    try:
        return ctypes.CDLL(str(built))
    except OSError:  # not there yet, or damaged
        with tempfile.TemporaryDirectory(dir=_folder()) as part:
            subprocess.run([*command, "-x", "c++", "-", "-o", f"{part}/so"], check=True, text=True,
                           capture_output=True, input=source)
            os.replace(f"{part}/so", built)  # whole or not at all, also between two processes
    return ctypes.CDLL(str(built))


@cache
def missing():
    """None, or why nothing could be compiled; a compiler without OpenMP gives one thread."""
    global NATIVE
    reason = "no C++ compiler found: install g++ or clang++, or set CXX"
    for openmp in ("-fopenmp", "-fopenmp-simd") if compiler() else ():
        try:
            library(macros("float32", 0, True, False), (*NATIVE[:2], openmp))
            NATIVE = *NATIVE[:2], openmp
            return None
        except subprocess.CalledProcessError as e:
            reason = f"{e.cmd[0]} failed on kernels.cu: {(e.stderr.strip() or 'no message')[:200]}"
        except OSError as e:
            reason = f"could not build or load kernels.cu: {e}"
    return reason


@cache
def _function(flags, dtype, *variant):
    return library(macros(str(dtype).removeprefix("torch."), *variant), flags).minidiff_update


def has_fma():
    """Whether the CPU has fused multiply-adds, as the compiler sees it."""
    return bool(library(macros("float32", 0, True, False), NATIVE).minidiff_has_fma())


def bind(out, operands, coef, per_sample, draws, clips, sums, seed, sample, tag):
    """run(step): see on_numpy.update."""
    (batch, size), (rows, width) = out.shape, coef.shape
    function = _function(NATIVE, out.dtype, len(operands), draws, clips, sums)
    partial = np.empty((batch, -(-size // 1024))) if sums else None  # a block is 1024 elements
    pointers = [u.data_ptr() for u in (out, *operands)] + [0] * (4 - len(operands))
    job = (ctypes.c_uint64 * 15)(  # struct Job
        *pointers, partial.ctypes.data if sums else 0, coef.data_ptr(), per_sample, batch, size,
        seed, sample, 0, tag, 1)
    job.memory = out, operands, coef, partial  # lives as long as what points to it

    def run(step):
        job[12] = step = int(step)
        if batch * size > SMALL:
            job[14] = threads.count()
        if rows > 1 and not per_sample:
            job[6] = coef.data_ptr() + 4 * width * max(0, min(step, rows - 1))
        function(job)
        return torch.from_numpy(partial.sum(1)) if sums else None
    return run
