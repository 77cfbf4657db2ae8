"""What a user has set around a call: defaults, modes, a fork. It changes no bit."""

import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from minidiff import kernels, langevin, solvers
from minidiff.kernels import Fused, apply, normal, update


def everything(backend, device):
    """What each primitive returns, as CPU tensors."""
    rng = np.random.default_rng(3)
    x, s = (torch.from_numpy(rng.standard_normal((5, 33), np.float32)).to(device) for _ in "xs")
    half, kw = x.half(), {"seed": 4, "backend": backend}
    counter = torch.from_numpy(np.array(1)).to(device)
    table = rng.standard_normal((3, 3))
    again = kernels.bind([x, s], table[0], **kw)
    found = [
        update([x, s], table[0], step=2, **kw), update([half], [.5, .3], **kw), again(3),
        update([x, s], table, step=counter, rows="step", **kw),
        update([x, s], [.5, .2, .1, 1., .5, -1., 1.], **kw),
        apply("perturb", x, a=.5, sigma=np.linspace(.1, 1, 5), **kw),
        normal((5, 9), device=device, **kw), kernels.norms(x, backend=backend),
        kernels.noise_norms(x, **kw), *kernels.dsm_loss(s, rng.uniform(.1, 1, (5, 3)), **kw),
        Fused(**kw).corrector(langevin.langevin_step, solvers.snr_step_size, 16)(0, x.clone(), s),
        Fused(**kw)(langevin.langevin_step, 2, eps=np.array([.1, .2]))(counter, x, s)]
    if device == "cpu" and backend != "triton":  # NumPy arrays as well, with a NumPy counter
        found.append(torch.from_numpy(update([x.numpy()], table[:, :2], step=np.array(2),
                                             rows="step", **kw)))
    return [v.cpu() for v in found]


@pytest.mark.parametrize("mode", [
    lambda device: torch.device("meta"), lambda device: torch.autocast(device, torch.bfloat16),
    lambda device: torch.inference_mode(), lambda device: torch.no_grad(),
    lambda device: default_dtype(torch.float64), lambda device: default_dtype(torch.float16)],
    ids=["default device", "autocast", "inference", "no grad", "float64", "float16"])
def test_what_a_user_has_set_changes_no_bit(place, mode):
    backend, device = place
    if backend == "cupy" and device == "cpu":
        pytest.skip("the emulator's own tensors are made on the default device")
    want = everything(backend, device)
    with mode(device):
        got = everything(backend, device)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@contextmanager
def default_dtype(dtype):
    """torch's default dtype for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


WOKEN_BY_TORCH = """
import multiprocessing as mp
import numpy as np
import torch
from minidiff import kernels
torch.set_num_threads(2)
torch.ones(1 << 20).add_(1)   # torch's own, and none of ours
x = np.ones((64, 4096), np.float32)
child = mp.get_context("fork").Process(target=lambda: kernels.update([x], [1.], backend="host"))
child.start()
child.join(60)
print(child.exitcode)
child.kill()
"""

FORKED = """
import multiprocessing as mp
import numpy as np
import torch
from minidiff import kernels, langevin, solvers
torch.set_num_threads(2)
x = torch.ones(70_000, 3)   # so many rows that torch's own sums over them take threads
wide = np.ones((64, 4096), np.float32)
bound = kernels.bind([wide], [1., .3], backend="host")
def work(send):
    rows = torch.ones(70_000, 3, dtype=torch.float64)
    engine = kernels.Fused()
    send([kernels.update([wide], [1., .3], backend="host"), bound(0), kernels.norms(x).numpy(),
          kernels.noise_norms(x).numpy(), kernels.dsm_loss(x, rows)[1].numpy(),
          kernels.update([x.T], rows[:3, :2], backend="host").numpy(),
          engine.corrector(langevin.langevin_step, solvers.snr_step_size, 16)(
              0, x.clone(), -x).numpy(), torch.get_num_threads()])
mine = []
work(mine.extend)
here, there = mp.Pipe()
child = mp.get_context("fork").Process(target=work, args=(there.send,))
child.start()
assert here.poll(60), "the child hangs"
theirs = here.recv()
child.join(60)
assert child.exitcode == 0
assert all(np.array_equal(a, b) for a, b in zip(mine[:-1], theirs[:-1], strict=True))
print("same", mine[-1], theirs[-1])
"""


@pytest.mark.skipif(not hasattr(os, "fork") or kernels.why_not("host") is not None,
                    reason="needs fork and a C++ compiler")
def test_a_forked_child_returns_the_same_bits():
    """OpenMP's threads stay behind: a child that called on them would wait for ever."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True,
                          timeout=200, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.stdout.strip() == "same 2 1", done.stderr
    done = subprocess.run([sys.executable, "-c", WOKEN_BY_TORCH], capture_output=True, text=True,
                          timeout=200, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.stdout.strip() == "0", done.stderr
