"""Where the backends run: on the GPU if there is one, else Triton in its interpreter."""

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from minidiff import kernels  # noqa: E402

torch.set_num_threads(1)  # small tensors: on a busy machine more threads wait for each other

GPU = "cuda" if CUDA else "cpu"
PLACES = [("torch", "cpu"), ("host", "cpu"), ("triton", GPU), ("cupy", GPU)]


@pytest.fixture(params=PLACES + [("torch", "cuda")] * CUDA, ids="-".join)
def place(request):
    """(backend, device), for each backend but the oracle."""
    reason = kernels.missing(request.param[0])
    if reason:
        pytest.skip(f"{request.param[0]}: {reason}")
    return request.param
