"""The CUDA C file on the GPU: compiled by NVRTC through CuPy, launched on torch's stream."""

from functools import cache

import numpy as np

from .on_host import SOURCE, macros

NAME, TAKES = "cupy", "cuda"
PACKS = 4     # packs of 16 bytes a thread
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


def options(*variant):
    """NVRTC's options for one variant of the kernel, on_host.macros."""
    return "--std=c++17", "--fmad=false", *macros(*variant)


@cache
def kernel(device, variant, name, more):
    import cupy
    return cupy.RawKernel(SOURCE.read_text() + more, name, options(*variant))


def launch(device, grid, arguments, *variant, name="update", more=""):
    """A kernel of the file, or of `more` beside it, on torch's stream; tensors are pointers."""
    import cupy
    import torch
    stream = torch.cuda.current_stream(device)
    with cupy.cuda.Device(device.index), cupy.cuda.Stream.from_external(stream):
        kernel(device.index, variant, name, more)((grid,), (THREADS,), tuple(
            a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments))


def tile(size, pack):
    """(log2 threads along a row, packs a thread, column tiles) for rows of `size` elements."""
    packs = -(-size // pack)
    full = (packs - 1).bit_length()  # a warp along a row, then several packs a thread, then more
    columns = min(max(full - PACKS.bit_length() + 1, min(full, 5)), THREADS.bit_length() - 1)
    each = min(PACKS, -(-packs >> columns) or 1)
    return columns, each, -(-packs // (each << columns))


def update(out, operands, coef, per_sample, draws, clips, sums, seed, sample, tag, step):
    """See on_numpy.update."""
    import torch
    (batch, size), item = out.shape, out.element_size()
    columns, packs, column_tiles = tile(size, 16 // item)
    aligned = size * item % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in (out, *operands))
    squares = out.new_zeros(batch, dtype=torch.float64) if sums else None
    counter, step = (0, step) if isinstance(step, int) else (step, 0)
    launch(out.device, -(-batch // (THREADS >> columns)) * column_tiles, (
        out, *operands, *[0] * (4 - len(operands)), squares if sums else 0, coef,
        np.int32(per_sample), counter, np.int64(len(coef)), np.int64(batch), np.int64(size),
        np.uint64(seed), np.uint32(sample), np.uint32(step), np.uint32(tag), np.int32(columns),
        np.int32(packs), np.uint32(column_tiles), np.int32(aligned)),
        str(out.dtype).removeprefix("torch."), len(operands), draws, clips, sums)
    return squares
