"""The CUDA C file on the GPU: compiled by CuPy's NVRTC, launched by CUDA's driver.

CuPy's own RawKernel would add -ftz=true to the options, and so flush subnormal numbers.
"""

from functools import cache

try:
    import torch
except ImportError:
    torch = None

from . import driver
from .on_host import SOURCE, macros

NAME = "cupy"
TAKES = "cuda"
PACKS = 8     # packs of 16 bytes a thread
THREADS = 256


@cache
def why_not():
    """Why CuPy cannot run here, or None."""
    try:
        import cupy
        import torch  # noqa: F401
    except ImportError as e:
        return f"{e.name} is not installed: pip install -e '.[cuda13]' (or '.[cuda12]')"
    return None if cupy.cuda.is_available() else "no CUDA device"


def options(aligned, *variant):
    """NVRTC's options for one variant of the kernel: on_host.macros, 16-byte accesses."""
    return "--std=c++17", "--fmad=false", f"-DALIGNED={int(aligned)}", *macros(*variant)


def machine_code(options, more=""):
    """What NVRTC makes of the file and of `more` beside it."""
    from cupy.cuda import nvrtc
    program = nvrtc.createProgram(SOURCE.read_text() + more, "kernels.cu", [], [])
    nvrtc.compileProgram(program, [*options])
    cubin = nvrtc.getCUBIN(program)
    nvrtc.destroyProgram(program)
    return cubin + b"\0"  # CuPy drops the last byte


@cache
def compiled(device, variant, name="update", more=""):
    """A kernel of the file, or of `more` beside it."""
    major, minor = torch.cuda.get_device_capability(device)
    architecture = f"--gpu-architecture=sm_{major}{minor}"
    code = machine_code((*options(*variant), architecture), more)
    return driver.load(device, code, name, THREADS, 0)


def tile(size, pack):
    """(log2 threads along a row, packs a thread, column tiles) for rows of such a size."""
    packs = -(-size // pack)
    full = (packs - 1).bit_length()
    a_warp = min(full, 5)  # along a row; then several packs a thread, then more threads
    several = full - PACKS.bit_length() + 1
    columns = min(max(several, a_warp), THREADS.bit_length() - 1)
    each = min(PACKS, -(-packs >> columns) or 1)
    return columns, each, -(-packs // (each << columns))


def prepare(launch):
    """run(step) of a `launch.Launch`, its arguments packed once."""
    out, operands, coef = launch.out, launch.operands, launch.coef
    batch, size = out.shape
    columns, packs, column_tiles = tile(size, 16 // out.element_size())
    blocks = -(-batch // (THREADS >> columns)) * column_tiles
    squares = None
    if launch.result:
        squares = out.new_empty(launch.sums(), dtype=torch.float64)
    variant = launch.aligned(), *launch.variant()
    arguments = [
        out, *operands, *[None] * (4 - len(operands)), squares, coef,
        launch.keys, launch.rows == "sample", len(coef), batch, size,
        launch.seed, launch.sample, launch.tag, columns, packs, column_tiles]
    kernel = compiled(out.device, variant)
    start = driver.prepare(out.device, kernel, blocks, arguments, launch.first_step)
    alone = column_tiles == 1 and columns <= 5  # as kernels.cu says: a warp has the row

    def run(step):
        if launch.result and not alone:
            squares.zero_()
        start(step)
        return squares
    return run
