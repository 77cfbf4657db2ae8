"""`triton` and `cupy` with no GPU: they take CPU tensors and compile for sm_90 as for a device,
and NumPy runs what they compiled."""

import ctypes
from functools import cache
from typing import NamedTuple

import numpy as np

from minidiff.bench.device.compiled import asked, why_not
from minidiff.kernels import driver, on_cupy, on_triton
from minidiff.kernels.check import words

from .arithmetic import U32
from .memory import Memory
from .parse import parsed
from .warps import Warps

blocks = range  # of a grid, those that run


class Emulated(NamedTuple):
    """driver.Kernel here."""

    text: str
    name: str
    threads: int
    shared: int = 0


def run(text, kernel, arguments, places, threads, shared=0):
    """Launch a kernel of a PTX file: tensors, which alone it may touch, and integers; which
    blocks of the grid, a block's threads, its bytes of shared memory. RuntimeError says what went
    wrong, or is not written."""
    tensors = [a for a in arguments if hasattr(a, "data_ptr")]
    scratch = np.full((len(places), shared), 0xFF, np.uint8)
    arrays = [(t.data_ptr(), t.numel() * t.element_size()) for t in tensors]
    memory = {"global": Memory(arrays, threads),
              "shared": Memory([(scratch.ctypes.data, scratch.nbytes)], threads, shared=True)}
    program, parameters = parsed(text, kernel), []
    if len(arguments) != len(program.parameters):
        raise RuntimeError(f"{len(arguments)} arguments for {len(program.parameters)} parameters "
                           f"of kernel {kernel!r} of {program.compiler}")
    for a, size in zip(arguments, program.parameters):
        if isinstance(a, ctypes._SimpleCData) and ctypes.sizeof(a) != size:
            raise RuntimeError(f"an argument of {ctypes.sizeof(a)} bytes for a parameter of {size}")
        value = a.data_ptr() if hasattr(a, "data_ptr") else getattr(a, "value", a)
        parameters.append((value or 0, size))
    groups = [range(w, w + 1) for w in range(threads // 32)] if shared else [range(threads // 32)]
    groups = [Warps(program, parameters, memory, scratch, np.asarray(places, U32), threads, warps)
              for warps in groups]
    with np.errstate(all="ignore"):
        while (more := {group.run() for group in groups}) != {False}:
            if more != {True}:
                raise RuntimeError("a barrier that not every warp comes to")
            for space in memory.values():
                space.barrier()
    for space in memory.values():
        space.barrier(last=True)


def prepare(device, kernel, count, arguments, first_step=0):
    """driver.prepare here; of what comes after the arguments a kernel takes what it has."""
    def launch(step=0):
        counter, number = (None, step) if isinstance(step, int) else (step, first_step)
        takes = len(parsed(kernel.text, kernel.name).parameters)
        given = [*arguments, counter, ctypes.c_uint32(number), None, None][:takes]
        run(kernel.text, kernel.name, given, blocks(count), kernel.threads, kernel.shared)
    return launch


class Launcher:
    """A Triton kernel, compiled and launched here: `compiled` is what it became last."""

    def __init__(self, kernel):
        self.kernel = kernel

    def warmup(self, *arguments, grid, **options):
        self.options = options
        self.compiled = self.kernel.warmup(*arguments, grid=grid, **options)
        return self.compiled

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            found = load(None, self.warmup(*arguments, grid=grid, **options))
            prepare(None, found, grid[0], (*arguments, None, None))()  # Triton's own two
        return launch


def load(device, found):
    """on_triton.loaded here."""
    of = found.metadata
    return Emulated(found.asm["ptx"], of.name, 32 * of.num_warps, of.shared)


@cache
def compiled_by_nvrtc(variant, more="", cubin=False, architecture=90):
    """The PTX for sm_90, or machine code, of kernels.cu and `more`."""
    if cubin:
        options = *on_cupy.options(*variant), f"--gpu-architecture=sm_{architecture}"
        return on_cupy.machine_code(options, more)
    from cupy.cuda import nvrtc
    program = nvrtc.createProgram(on_cupy.SOURCE.read_text() + more, "kernels.cu", [], [])
    nvrtc.compileProgram(program, [*on_cupy.options(*variant), "--gpu-architecture=compute_90"])
    return nvrtc.getPTX(program).decode()


def compiled(device, variant, name="update", more=""):
    """on_cupy.compiled here."""
    return Emulated(compiled_by_nvrtc(variant, more), name, on_cupy.THREADS)


@cache
def emulate():
    """From here on, in this process, `triton` and `cupy` run what they compile on the CPU, where
    they can be compiled. RuntimeError where there is a GPU."""
    import torch
    if torch.cuda.is_available():
        raise RuntimeError("there is a GPU to run the kernels")
    for name, module in (("triton", on_triton), ("cupy", on_cupy)):
        if not why_not(name):
            module.TAKES, module.why_not = "cpu", lambda: None
    on_cupy.compiled, on_triton.loaded, driver.prepare = compiled, load, prepare
    if not why_not("triton"):
        from triton.runtime import driver as of_triton
        of_triton.set_active(asked(90))
        for module, name in ((on_triton, "kernel"), (words, "_words"), (words, "_stages")):
            setattr(module, name, Launcher(getattr(module, name)))
