"""The CUDA C file on the GPU: compiled by NVRTC through CuPy, launched by CUDA's driver."""

from ctypes import c_int, c_int64, c_uint32, c_uint64
from functools import cache

try:
    import torch
except ImportError:
    torch = None

from . import driver
from .on_host import SOURCE, macros

NAME, TAKES = "cupy", "cuda"
PACKS = 8     # packs of 16 bytes a thread
THREADS = 256


@cache
def missing():
    """None, or what CuPy lacks here."""
    try:
        import cupy
        import torch  # noqa: F401
    except ImportError as e:
        return f"{e.name} is not installed: pip install -e '.[cuda13]' (or '.[cuda12]')"
    return None if cupy.cuda.is_available() else "no CUDA device"


def options(aligned, *variant):
    """NVRTC's options for one variant of the kernel: on_host.macros, and 16-byte accesses."""
    return "--std=c++17", "--fmad=false", f"-DALIGNED={int(aligned)}", *macros(*variant)


@cache
def compiled(device, variant, name="update", more=""):
    """A kernel of the file, or of `more` beside it."""
    import cupy
    with cupy.cuda.Device(device.index):
        found = cupy.RawKernel(SOURCE.read_text() + more, name, options(*variant))
        return driver.Kernel(found.kernel.ptr, THREADS, owner=found)


def tile(size, pack):
    """(log2 threads along a row, packs a thread, column tiles) for rows of `size` elements."""
    packs = -(-size // pack)
    full = (packs - 1).bit_length()  # a warp along a row, then several packs a thread, then more
    columns = min(max(full - PACKS.bit_length() + 1, min(full, 5)), THREADS.bit_length() - 1)
    each = min(PACKS, -(-packs >> columns) or 1)
    return columns, each, -(-packs // (each << columns))


def bind(out, operands, coef, per_sample, draws, clips, sums, seed, sample, tag):
    """run(step): see on_numpy.update."""
    (batch, size), item = out.shape, out.element_size()
    columns, packs, column_tiles = tile(size, 16 // item)
    aligned = size * item % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in (out, *operands))
    squares = out.new_empty(batch, dtype=torch.float64) if sums else None
    variant = aligned, str(out.dtype).removeprefix("torch."), len(operands), draws, clips, sums
    blocks = -(-batch // (THREADS >> columns)) * column_tiles
    launch = driver.prepare(out.device, compiled(out.device, variant), blocks, (
        out, *operands, *[None] * (4 - len(operands)), squares, coef, c_int(per_sample),
        c_int64(len(coef)), c_int64(batch), c_int64(size), c_uint64(seed), c_uint32(sample),
        c_uint32(tag), c_int(columns), c_int(packs), c_uint32(column_tiles)))

    def run(step):
        if sums:
            squares.zero_()
        if isinstance(step, int):
            launch(None, step)
        else:
            launch(step)
        return squares
    return run


def update(*case):
    """See on_numpy.update."""
    *case, step = case
    return bind(*case)(step)
