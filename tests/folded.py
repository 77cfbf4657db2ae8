"""Arrays of more than 2^31 elements in four megabytes of memory.

Why. A kernel that computes an element's place in 32 bits is right for every array that a
test can afford, and wrong from 2^31 elements on: the place wraps, and what belongs at the
array's end is written near its beginning, or before it. To see that, one needs such an
array, of 4 GiB at least.

How. Memory comes in pages, and several addresses may show the same page. `folded(shape)`
reserves addresses for the whole array, and maps the same 4 MiB behind all of them, again
and again. So the array has its full size for every kernel and takes 4 MiB. An element
shares its memory with those 2^21 places further on, hence of what is written only the last
2^21 elements stay: the end, which is where an offset would have wrapped. Before the array
lie 4 GiB of addresses that share another 4 MiB. A wrapped offset's writes land there, or in
the array's own fold, and not in memory that belongs to something else: the end then lacks
what belongs there, and the test fails, not Python.

In a test. Take the fixture, write, and look at the end alone:

    def test_beyond_2_31_elements(folded):
        for shape in LARGE:
            out = folded(shape)
            kernels.normal(shape, out=out, seed=7, sample=1)
            got, want = last_normals(out, seed=7, sample=1)
            assert torch.equal(got, want.to(out.dtype))

`last_normals` computes what belongs there from the counters alone. `folded.period` is how
many elements the memory holds. Elements have 16 bits. It takes seconds for a kernel that
writes all of the array; a test of an interpreted one runs the last block alone. Needs
Linux.
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
    """The end of out's last rows, and the float32 normals that belong there."""
    batch, size = out.shape
    held = min(batch, 3 if size < 8 else 1)
    rows = range(batch - held, batch)
    quads = range(max(0, (size - 5) // 4), (size + 3) // 4)  # the last two, or the only
    first = 4 * quads[0]
    want = normals_at(rows, quads, seed, sample)[:, :size - first]
    return out[rows[0]:, first:], torch.from_numpy(want)


@pytest.fixture
def folded():
    """folded(shape, dtype): a tensor of 16-bit elements whose memory holds 2^21 of them."""
    if not hasattr(os, "memfd_create"):
        pytest.skip("needs Linux's memfd_create")
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    integers = [ctypes.c_int] * 3
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *integers, ctypes.c_long]
    access = mmap.PROT_READ | mmap.PROT_WRITE
    fixed = 0x10  # Linux's MAP_FIXED, at these addresses, which mmap lacks
    below = 1 << 32  # bytes before the array: as far as a 32-bit offset reaches
    period = 1 << 22  # bytes of the memory behind either part
    maps = []

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
