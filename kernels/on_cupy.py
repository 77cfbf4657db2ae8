"""The CUDA C file on the GPU: compiled by NVRTC through CuPy, launched on torch's stream."""

from functools import cache
from pathlib import Path

NAME, TAKES = "cupy", "cuda"
SOURCE = Path(__file__).with_name("kernels.cu")
STORAGE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
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


def options(dtype, operands, draws, clips, sums=False):
    """NVRTC's options for one variant of the kernel."""
    return ("--std=c++17", "--fmad=false", f"-DSTORAGE={STORAGE[dtype]}",
            f"-DOPERANDS={operands}", f"-DDRAWS={int(draws)}", f"-DCLIP={int(clips)}",
            f"-DSUMS={int(sums)}")


@cache
def kernel(device, *variant):
    import cupy
    return cupy.RawKernel(SOURCE.read_text(), "update", options(*variant))


def tile(size, pack):
    """(log2 threads along a row, packs a thread, column tiles) for rows of `size` elements."""
    packs = -(-size // pack)
    columns = min((packs - 1).bit_length(), THREADS.bit_length() - 1)
    each = min(PACKS, -(-packs >> columns) or 1)
    return columns, each, -(-packs // (each << columns))


def update(out, operands, coef, draws, clips, shape, seed, sample, step, tag, sums=False):
    """See on_numpy.update. coef: float32 CUDA tensor (rows, width)."""
    import cupy
    import numpy as np
    import torch
    batch, size = shape
    first = (operands or [out])[0]
    dtype, device = str(first.dtype).removeprefix("torch."), first.device
    counter = step if hasattr(step, "data_ptr") else None
    columns, packs, column_tiles = tile(size, 16 // first.element_size())
    pointers = [0 if t is None else t.data_ptr() for t in (out, *operands)]
    aligned = all(p % 16 == 0 for p in pointers) and size * first.element_size() % 16 == 0
    pointers += [0] * (5 - len(pointers))
    squares = torch.zeros(batch, dtype=torch.float64, device=device) if sums else None
    stream = torch.cuda.current_stream(device)
    with cupy.cuda.Device(device.index), cupy.cuda.Stream.from_external(stream):
        kernel(device.index, dtype, len(operands), draws, clips, sums)(
            (-(-batch // (THREADS >> columns)) * column_tiles,), (THREADS,),
            (*pointers, squares.data_ptr() if sums else 0, coef.data_ptr(),
             np.int32(counter is None and len(coef) > 1),
             counter.data_ptr() if counter is not None else 0, np.int64(len(coef)),
             np.int64(batch), np.int64(size), np.uint64(seed & (1 << 64) - 1),
             np.uint32(sample & 0xFFFFFFFF),
             np.uint32(0 if counter is not None else step & 0xFFFFFFFF),
             np.uint32(tag), np.int32(columns), np.int32(packs), np.uint32(column_tiles),
             np.int32(aligned)))
    return squares
