"""What adds up squares, timed: norms, the loss with its gradient, the corrector."""

from functools import partial

import torch

from ..kernels import BACKENDS, Fused, dsm_loss, noise_norms, norms
from ..langevin import langevin_step
from ..solvers import snr_step_size
from .check import check_sums
from .clock import clock, summary
from .rows import ELEMENTS, add_speedups, row_of, shape_of

SUMS = "norms", "noise_norms", "dsm_loss", "corrector"


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


def inplace_corrector(x, s, z, snr=.16):
    """The same in x's and z's own memory."""
    z.normal_()
    alpha = 2 * (snr * z.norm(dim=1) / s.norm(dim=1)).square()[:, None]
    return x.addcmul_(s, alpha).addcmul_(z, (2 * alpha).sqrt())


def sums_case(op, elements, dtype, device):
    """(backend name -> call, {peer: call}, bytes, operand, coef of dsm_loss)."""
    shape = shape_of(elements)
    x, s, z = (torch.randn(shape, device=device).to(getattr(torch, dtype)) for _ in "xsz")
    coef = torch.rand((shape[0], 3), device=device)
    ours, peers, passes = {
        "norms": (lambda name: partial(norms, s, backend=name),
                  {"torch_eager": lambda: s.norm(dim=1)}, 1),
        "noise_norms": (lambda name: partial(noise_norms, s, backend=name),
                        {"torch_eager": lambda: torch.randn_like(s).norm(dim=1),
                         "torch_inplace": lambda: z.normal_().norm(dim=1)}, 0),
        "dsm_loss": (lambda name: partial(dsm_loss, s, coef, backend=name),
                     {"torch_eager": partial(composed_loss, s, coef)}, 2),
        "corrector": (lambda name: partial(Fused(backend=name).correct, langevin_step,
                                           snr_step_size, x.clone(), s, 0, 0),
                      {"torch_eager": partial(eager_corrector, x, s),
                       "torch_inplace": partial(inplace_corrector, x.clone(), s, z)}, 4)}[op]
    return ours, peers, passes * s.nbytes, s, coef


def bench_sums(op, names, elements=None, dtype="float32", device="cpu", own=None):
    """As bench, for norms, `dsm_loss` (value and gradient) and `corrector` (norms, then the
    step in place), against torch's forms."""
    rows, names = [], [n for n in names if n in BACKENDS]
    for name in names:
        if not all(row["passed"] for row in check_sums(name, dtypes=(dtype,), shapes=[(37, 1024)])):
            raise RuntimeError(f"{op}: {name} does not return the reference's sums; nothing was "
                               "timed")
    for n in elements or ELEMENTS:
        make, peers, size, s, coef = sums_case(op, n, dtype, device)
        functions = {name: make(name) for name in names} | peers
        if own and op in own.functions:
            functions[own.file] = own.bind(op, [s], coef, {})
        copied, out = s.clone(), s.clone()
        times = clock(functions | {"copy": lambda a=copied, b=out: b.copy_(a)}, device)
        copy_rate = 2 * s.nbytes / summary(times["copy"])["seconds"]
        found = []
        for name in functions:
            t, peer = summary(times[name]), name in peers
            rate = None if peer else size / t["seconds"]
            found.append(row_of(op, name, dtype, s.shape, **t, bytes=None if peer else size,
                                gb_per_s=rate and rate / 1e9,
                                fraction_of_copy=rate and rate / copy_rate,
                                matches_reference=None if peer else True))
        rows += add_speedups(found)
    return rows
