"""What a thread has set, flushing or rounding, changes no bit; and it keeps what it had."""

import ctypes
import os

import numpy as np
import pytest
import torch

from minidiff import kernels
from minidiff.kernels import update

pytestmark = pytest.mark.skipif(kernels.why_not("host") is not None, reason="no C++ compiler")

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def flushing():
    """torch.set_flush_denormal(True) and two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush")
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["numpy", "torch", "host"])
def test_subnormal_coefficients_are_kept_whatever_the_thread_does(flushing, backend):
    x = np.ones((2, 3), np.float32)
    bits = []
    for coef in ([1e-40], np.array([[1e-40]] * 2), torch.tensor([1e-40], dtype=torch.float64),
                 torch.tensor([71362], dtype=torch.int32).view(torch.float32)):
        bits.append(update([x], coef, backend=backend).view(np.int32))
    assert all((b == 71362).all() for b in bits)
    made = kernels.apply("langevin", x, x, eps=2e-40, backend=backend)
    _, gradient = kernels.dsm_loss(0 * x, [1e-40, 1., .5], backend=backend)
    torch.set_flush_denormal(False)
    assert np.array_equal(made, kernels.apply("langevin", x, x, eps=2e-40, backend="numpy"))
    _, want = kernels.dsm_loss(0 * x, [1e-40, 1., .5], backend="numpy")
    assert np.array_equal(gradient.view(np.int32), want.view(np.int32)) and gradient.any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["numpy", "torch", "host"])
def test_subnormal_results_are_kept_whatever_the_thread_does(flushing, backend, dtype):
    """Of 2^18 elements, on two threads; and the thread flushes afterwards as before."""
    bits = torch.full((64, 4096), 71362 if dtype == "float32" else 5, dtype=torch.int32)
    x = bits.view(torch.float32) if dtype == "float32" else bits.short().view(torch.bfloat16)
    if dtype == "float32":
        got = update([x], [.5], backend=backend).view(torch.int32)
        assert (got == 71362 // 2).all()
    else:
        got = update([x], [2.], backend=backend).view(torch.int16)
        assert (got == 10).all()
    assert np.float32(2.**-149) * np.float32(1) == 0
    assert torch.get_num_threads() == 2


def test_the_host_rounds_to_nearest_whatever_the_thread_does():
    """fesetround(FE_UPWARD), with x86's value of it."""
    libm = ctypes.CDLL("libm.so.6")
    if os.uname().machine != "x86_64":
        pytest.skip("another value")
    want = update([X], [.1, .3], seed=1, backend="host")
    libm.fesetround(0x800)
    try:
        got = update([X], [.1, .3], seed=1, backend="host")
        assert libm.fegetround() == 0x800
    finally:
        libm.fesetround(0)
    assert np.array_equal(got, want)
