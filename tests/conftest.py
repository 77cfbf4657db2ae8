"""Where the backends run: on the GPU if there is one, else Triton in its interpreter."""

import ctypes
import math
import mmap
import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from minidiff import kernels  # noqa: E402
from minidiff.__main__ import main  # noqa: E402
from minidiff.bench import emulate  # noqa: E402
from minidiff.kernels import driver, on_cupy  # noqa: E402

torch.set_num_threads(1)  # small tensors: on a busy machine more threads wait for each other

GPU = "cuda" if CUDA else "cpu"
PLACES = [("torch", "cpu"), ("host", "cpu"), ("triton", GPU), ("cupy", GPU)]


@pytest.fixture
def cupy_here(monkeypatch):
    """on_cupy takes CPU tensors, and NumPy runs what NVRTC compiles."""
    if reason := emulate.lacking("cupy"):
        pytest.skip(f"cupy: {reason}")
    for name, value in (("TAKES", "cpu"), ("missing", lambda: None),
                        ("compiled", emulate.compiled)):
        monkeypatch.setattr(on_cupy, name, value)
    monkeypatch.setattr(driver, "prepare", emulate.prepare)


@pytest.fixture(params=PLACES + [("torch", "cuda")] * CUDA, ids="-".join)
def place(request):
    """(backend, device), for each backend but the oracle."""
    if request.param == ("cupy", "cpu"):
        request.getfixturevalue("cupy_here")
    reason = kernels.missing(request.param[0])
    if reason:
        pytest.skip(f"{request.param[0]}: {reason}")
    return request.param


@pytest.fixture
def refused(capsys):
    """refused(*words, argv=): the command ends with 2 and one line that holds the words."""
    def check(*words, argv):
        assert main(argv) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error and all(w in error for w in words), error
    return check


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
