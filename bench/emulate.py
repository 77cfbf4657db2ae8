"""`triton` and `cupy` with no GPU: they take CPU tensors, compile for sm_90 as for a device, and
NumPy runs it (ptx.py)."""

import ctypes
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

from ..kernels import driver, on_cupy, on_triton
from . import ptx, stages

blocks = range  # of a grid, those that run


class Emulated(NamedTuple):
    """driver.Kernel here."""

    text: str
    name: str
    threads: int
    shared: int = 0


def prepare(device, kernel, count, arguments):
    """driver.prepare here; of what comes after the arguments a kernel takes what it has."""
    def launch(counter=None, step=0):
        takes = len(ptx.parsed(kernel.text, kernel.name).parameters)
        given = [*arguments, counter, ctypes.c_uint32(step), None, None][:takes]
        ptx.run(kernel.text, kernel.name, given, blocks(count), kernel.threads, kernel.shared)
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
    """on_triton.load here."""
    of = found.metadata
    return Emulated(found.asm["ptx"], of.name, 32 * of.num_warps, of.shared)


@cache
def compiled_by_nvrtc(variant, more="", cubin=False):
    """The PTX, or the machine code for sm_90, of kernels.cu and `more`."""
    from cupy.cuda import nvrtc
    program = nvrtc.createProgram(on_cupy.SOURCE.read_text() + more, "kernels.cu", [], [])
    nvrtc.compileProgram(program, [*on_cupy.options(*variant), "--gpu-architecture="
                                   + ("sm_90" if cubin else "compute_90")])
    # CuPy drops the last byte
    return nvrtc.getCUBIN(program) + b"\0" if cubin else nvrtc.getPTX(program).decode()


def compiled(device, variant, name="update", more=""):
    """on_cupy.compiled here."""
    return Emulated(compiled_by_nvrtc(variant, more), name, on_cupy.THREADS)


@cache
def lacking(name):
    """None, or what `triton` or `cupy` lacks to be compiled here."""
    if name == "triton":
        return "TRITON_INTERPRET is set" if on_triton.INTERPRET else \
            None if on_triton.triton else "triton is not installed: pip install triton"
    try:
        from cupy.cuda import nvrtc
        nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as e:
        return f"no NVRTC: pip install -e '.[cuda13]' ({e})".splitlines()[0]


@cache
def emulate():
    """From here on, in this process, `triton` and `cupy` run what they compile on the CPU, where
    they can be compiled. RuntimeError where there is a GPU."""
    import torch
    if torch.cuda.is_available():
        raise RuntimeError("there is a GPU to run the kernels")
    for name, module in (("triton", on_triton), ("cupy", on_cupy)):
        if not lacking(name):
            module.TAKES, module.missing = "cpu", lambda: None
    on_cupy.compiled, on_triton.load, driver.prepare = compiled, load, prepare
    if not lacking("triton"):
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver as of_triton
        none = lambda *_: 0
        of_triton.set_active(SimpleNamespace(get_current_device=none, get_current_stream=none,
                                          get_current_target=lambda: GPUTarget("cuda", 90, 32)))
        for module, name in ((on_triton, "kernel"), (stages, "_words"), (stages, "_stages")):
            setattr(module, name, Launcher(getattr(module, name)))
