"""Arrays of more than 2^31 elements, and what belongs at their end, in little memory.

An offset of 32 bits wraps there, and what it writes lands elsewhere. `folded` makes a tensor
whose pages are one small memory again and again, so that the whole array can be computed; before
it lie 4 GiB that share another such memory, which would take a wrapped offset's writes.
"""

import ctypes
import math
import mmap
import os

import pytest
import torch

from minidiff.kernels.check.compare import normals_at

LARGE = (2**32 + 5, 1), (2**29 + 3, 5), (3, 2**30 + 8), (1, 2**31 + 8)  # many rows, few, one


def last_normals(out, seed, sample):
    """The end of out's last rows, and the float32 normals that belong there, as tensors, both
    of `kernels.normal`."""
    batch, size = out.shape
    rows = range(batch - min(batch, 3 if size < 8 else 1), batch)
    quads = range(max(0, (size - 5) // 4), (size + 3) // 4)  # the last two, or the only
    want = normals_at(rows, quads, seed, sample)[:, :size - 4 * quads[0]]
    return out[rows[0]:, 4 * quads[0]:], torch.from_numpy(want)


@pytest.fixture
def folded():
    """folded(shape): 16 bits in an address space of their own but a memory of 2^21 elements,
    after 4 GiB that share another such memory and so take what a wrapped offset would write."""
    if not hasattr(os, "memfd_create"):
        pytest.skip("needs Linux's memfd_create")
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    access, fixed = mmap.PROT_READ | mmap.PROT_WRITE, 0x10
    below, period, maps = 1 << 32, 1 << 22, []

    def make(shape, dtype=torch.bfloat16):
        used = 2 * math.prod(shape)
        size = below + -(-used // period) * period
        base = libc.mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        maps.append((base, size))
        for start, end in ((base, base + below), (base + below, base + size)):
            file = os.memfd_create("folded")
            os.ftruncate(file, period)
            for at in range(start, end, period):
                assert libc.mmap(at, period, access, mmap.MAP_SHARED | fixed, file, 0) == at
            os.close(file)
        memory = (ctypes.c_char * used).from_address(base + below)
        return torch.frombuffer(memory, dtype=dtype).view(shape)
    make.period = period // 2
    yield make
    for base, size in maps:
        libc.munmap(ctypes.c_void_p(base), ctypes.c_size_t(size))
