"""What adds up squares, timed: the denoising loss with its gradient, and the corrector."""

from functools import partial

import torch

from ..kernels import BACKENDS, Fused, dsm_loss
from ..langevin import langevin_step
from ..solvers import snr_step_size
from .check import check_sums
from .clock import clock, summary
from .rows import ELEMENTS, add_speedups, row_of, shape_of

SUMS = "dsm_loss", "corrector"


def composed_loss(s, coef):
    """The denoising loss of torch operations and its gradient by autograd, with torch.randn."""
    s = s.detach().requires_grad_()
    e = coef[:, :1] * s + coef[:, 1:2] * torch.randn_like(s)
    loss = (coef[:, 2] * e.square().sum(1)).sum()
    loss.backward()
    return loss, s.grad


def eager_corrector(x, s, snr=.16):
    """One Langevin correction with each sample's own step size, of torch operations."""
    z = torch.randn_like(x)
    alpha = 2 * (snr * z.norm(dim=1) / s.norm(dim=1)).square()[:, None]
    return x + alpha * s + (2 * alpha).sqrt() * z


def sums_case(op, elements, dtype, device):
    """(a function that makes a backend's call, eager call, bytes, s, coef of dsm_loss)."""
    shape = shape_of(elements)
    x, s = (torch.randn(shape, device=device).to(getattr(torch, dtype)) for _ in "xs")
    coef = torch.rand((shape[0], 3), device=device)
    if op == "dsm_loss":
        return lambda name: partial(dsm_loss, s, coef, backend=name), \
            partial(composed_loss, s, coef), 2 * s.nbytes, s, coef
    return lambda name: partial(Fused(backend=name).correct, langevin_step, snr_step_size, x, s, 0,
                                0), partial(eager_corrector, x, s), 4 * s.nbytes, s, coef


def bench_sums(op, names, elements=None, dtype="float32", device="cpu", own=None):
    """As bench, for `dsm_loss` (value and gradient) and `corrector` (norms, then the step),
    against torch_eager alone."""
    rows, names = [], [n for n in names if n in BACKENDS]
    for name in names:
        if not all(row["passed"] for row in check_sums(name, dtypes=(dtype,), shapes=[(37, 1024)])):
            raise RuntimeError(f"{op}: {name} does not return the reference's sums; nothing was "
                               "timed")
    for n in elements or ELEMENTS:
        make, eager, size, s, coef = sums_case(op, n, dtype, device)
        functions = {name: make(name) for name in names} | {"torch_eager": eager}
        if own and op in own.functions:
            functions[own.file] = own.bind(op, [s], coef, {})
        copied, out = s.clone(), s.clone()
        times = clock(functions | {"copy": lambda a=copied, b=out: b.copy_(a)}, device)
        copy_rate = 2 * s.nbytes / summary(times["copy"])["seconds"]
        found = []
        for name in functions:
            t, peer = summary(times[name]), name == "torch_eager"
            rate = None if peer else size / t["seconds"]
            found.append(row_of(op, name, dtype, s.shape, **t, bytes=None if peer else size,
                                gb_per_s=rate and rate / 1e9,
                                fraction_of_copy=rate and rate / copy_rate,
                                matches_reference=None if peer else True))
        rows += add_speedups(found)
    return rows
