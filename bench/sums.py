"""What adds up squares, timed: norms, the loss with its gradient, the corrector."""

from functools import partial

import torch

from ..kernels import BACKENDS, Fused, dsm_loss, noise_norms, norms
from ..langevin import langevin_step
from ..sample import Reference
from ..solvers import snr_step_size
from .check import check_sums
from .clock import SECONDS, clock, summary
from .peers import PEERS
from .rows import ELEMENTS, add_speedups, row_of, shape_of

SUMS = "norms", "noise_norms", "dsm_loss", "corrector"


def composed(s, coef, z):
    """The denoising loss of torch operations."""
    e = coef[:, :1] * s + coef[:, 1:2] * z
    return (coef[:, 2] * e.square().sum(1)).sum()


def loss_and_gradient(s, coef, draw, loss=composed):
    """Its value, and its gradient by autograd."""
    s = s.detach().requires_grad_()
    value = loss(s, coef, draw())
    value.backward()
    return value, s.grad


def corrected(x, s, z, snr=.16):
    """One Langevin correction with each sample's own step size, of torch operations."""
    alpha = 2 * (snr * z.norm(dim=1) / s.norm(dim=1)).square()[:, None]
    return x + alpha * s + (2 * alpha).sqrt() * z


def corrected_inplace(x, s, z, snr=.16):
    """The same in x's own memory."""
    alpha = 2 * (snr * z.norm(dim=1) / s.norm(dim=1)).square()[:, None]
    return x.addcmul_(s, alpha).addcmul_(z, (2 * alpha).sqrt())


def compiled(f):
    """torch.compile of f, z drawn outside the graph, as for the updates."""
    torch._dynamo.reset()
    return torch.compile(f, dynamic=False, fullgraph=True)


def check_corrector(name, f, s, normal=None):
    """RuntimeError unless f(x, s) of the first rows is the reference's correction: float32 rounds
    its terms, and the norms in their coefficients, by less than 2^-20 of them."""
    x = torch.ones_like(s)
    got, (x64, s64) = f(x.clone(), s), (u.cpu().double().numpy() for u in (x, s))
    want = Reference(normal=normal).correct(langevin_step, snr_step_size, x64, s64, 0, 0)
    slack = max(2.**-20, 4 * torch.finfo(s.dtype).eps) * (3 + abs(want))
    if not (abs(got.cpu().double().numpy() - want) <= slack).all():
        raise RuntimeError(f"corrector: {name} does not follow the reference; nothing was timed")


def checked(name, f, x, s, draw):
    """A peer's correction as a call, after a look at one with an explicit z."""
    z = torch.randn_like(s[:64])
    check_corrector(name, lambda x, s: f(x, s, z), s[:64], lambda *_: z.cpu().double().numpy())
    return lambda: f(x, s, draw())


def sums_case(op, elements, dtype, device):
    """(backend name -> call, {peer: call}, bytes, operand, coef of dsm_loss)."""
    shape = shape_of(elements)
    x, s, z = (torch.randn(shape, device=device).to(getattr(torch, dtype)) for _ in "xsz")
    coef, fresh = torch.rand((shape[0], 3), device=device), partial(torch.randn_like, s)
    forms = {"torch_eager": (corrected, fresh), "torch_inplace": (corrected_inplace, z.normal_),
             "torch_compile": (compiled(corrected), z.normal_)}
    ours, peers, passes = {
        "norms": (lambda name: partial(norms, s, backend=name),
                  {"torch_eager": lambda: s.norm(dim=1)}, 1),
        "noise_norms": (lambda name: partial(noise_norms, s, backend=name),
                        {"torch_eager": lambda: torch.randn_like(s).norm(dim=1),
                         "torch_inplace": lambda: z.normal_().norm(dim=1)}, 0),
        "dsm_loss": (lambda name: partial(dsm_loss, s, coef, backend=name),
                     {"torch_eager": partial(loss_and_gradient, s, coef, fresh),
                      "torch_inplace": partial(loss_and_gradient, s, coef, z.normal_),
                      "torch_compile": partial(loss_and_gradient, s, coef, z.normal_,
                                               compiled(composed))}, 2),
        "corrector": (lambda name: partial(Fused(backend=name).correct, langevin_step,
                                           snr_step_size, x.clone(), s, 0, 0),
                      {name: checked(name, f, x.clone(), s, draw)
                       for name, (f, draw) in forms.items()}, 4)}[op]
    return ours, peers, passes * s.nbytes, s, coef


def bench_sums(op, names, elements=None, dtype="float32", device="cpu", own=None, seed=0,
               seconds=SECONDS):
    """As bench, for norms, `dsm_loss` (value and gradient) and `corrector` (norms, then the
    step in place), against torch's forms."""
    rows, named, names = [], names, [n for n in names if n in BACKENDS]
    torch.manual_seed(seed)
    for name in names:
        if not all(row["passed"] for row in check_sums(name, dtypes=(dtype,), shapes=[(37, 1024)])):
            raise RuntimeError(f"{op}: {name} does not return the reference's sums; nothing was "
                               "timed")
    for n in elements or ELEMENTS:
        make, peers, size, s, coef = sums_case(op, n, dtype, device)
        peers = {name: f for name, f in peers.items() if name in named
                 and not PEERS[name].lacks(None, dtype, device != "cpu")}
        functions = {name: make(name) for name in names} | peers
        for name in names if op == "corrector" else ():
            check_corrector(name, partial(Fused(backend=name).correct, langevin_step,
                                          snr_step_size, k=0, tag=0), s[:64])
        if own and op in own.functions:
            functions[own.file] = own.bind(op, [s], coef, {})
        copied, out = s.clone(), s.clone()
        times = clock(functions | {"copy": lambda a=copied, b=out: b.copy_(a)}, device,
                      seconds)
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
