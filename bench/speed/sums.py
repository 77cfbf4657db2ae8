"""What adds up squares, timed: norms, the loss with its gradient, the corrector."""

from functools import partial

import torch

from ... import noise
from ...kernels import BACKENDS, Fused, dsm_loss, noise_norms, norms
from ...kernels.check import COUNTER, check_sums
from ...kernels.check.compare import expected_sums, in_parts, normals, require_same
from ...langevin import langevin_step
from ...samplers import Reference
from ...solvers import snr_step_size
from ..peers import PEERS
from .clock import SECONDS
from .rows import ELEMENTS, add_speedups, row_of, shape_of
from .timed import (
    AFTER,
    refresh,
    require_possible,
    times_of,
    yardsticks,
)

TAG = noise.CORRECTOR
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


def check_corrector(name, f, s, z=None):
    """RuntimeError unless f(x, s) is the reference's correction, whole, with its own noise or with
    z: float32 rounds its terms, and the norms in their coefficients, by less than 2^-20 of them."""
    x = torch.ones_like(s)
    got = f(x.clone(), s)
    eps = max(2.**-20, 4 * torch.finfo(s.dtype).eps)
    z = normals(tuple(s.shape), tag=TAG) if z is None else z

    def part(rows):
        x64, s64 = (u[rows].cpu().double().numpy() for u in (x, s))
        op = Reference(normal=lambda *_: z[rows].cpu().double().numpy())
        want = op.correct(langevin_step, snr_step_size, x64, s64, 0, TAG)
        return (abs(got[rows].cpu().double().numpy() - want) <= eps * (3 + abs(want))).all()
    if not all(in_parts(part, *s.shape)):
        raise RuntimeError(f"corrector: {name} does not follow the reference; what was timed is "
                           "not reported")


def checked(name, f, x, s, draw):
    """A peer's correction as a call, after a look at one with an explicit z."""
    z = torch.randn_like(s)
    check_corrector(name, lambda x, s: f(x, s, z), s, z)
    return lambda: f(x, s, draw())


def corrector(name):
    """A backend's correction, a function of x and s."""
    return partial(Fused(backend=name).correct, langevin_step, snr_step_size, k=0, tag=TAG)


def sums_case(op, elements, dtype, device):
    """({backend: call}, {(peer, whether z is given): call}, bytes, operand, coef of dsm_loss)."""
    shape = shape_of(elements)
    x, s, z = (torch.randn(shape, device=device).to(getattr(torch, dtype)) for _ in "xsz")
    coef, fresh = torch.rand((shape[0], 3), device=device), partial(torch.randn_like, s)
    given = lambda: z
    forms = {"torch_eager": (corrected, fresh), "torch_inplace": (corrected_inplace, z.normal_),
             "torch_compile": (compiled(corrected), z.normal_)}
    loss = partial(loss_and_gradient, s, coef)
    ours, peers, passes = {
        "norms": (lambda name: partial(norms, s, backend=name),
                  {("torch_eager", False): lambda: s.norm(dim=1)}, 1),
        "noise_norms": (lambda name: partial(noise_norms, s, backend=name),
                        {("torch_eager", False): lambda: torch.randn_like(s).norm(dim=1),
                         ("torch_inplace", False): lambda: z.normal_().norm(dim=1),
                         ("torch_eager", True): lambda: z.norm(dim=1)}, 0),
        "dsm_loss": (lambda name: partial(dsm_loss, s, coef, backend=name),
                     {("torch_eager", False): partial(loss, fresh),
                      ("torch_inplace", False): partial(loss, z.normal_),
                      ("torch_compile", False): partial(loss, z.normal_, compiled(composed)),
                      ("torch_eager", True): partial(loss, given),
                      ("torch_compile", True): partial(loss, given, compiled(composed))}, 2),
        "corrector": (lambda name: partial(corrector(name), x.clone(), s),
                      {(name, False): checked(name, f, x.clone(), s, draw)
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
        rows += sums_at(op, names, named, n, dtype, device, own, seed, seconds)
    return rows


def sums_at(op, names, named, elements, dtype, device, own, seed, seconds):
    """Rows of one size, checked whole before the clock and after it."""
    make, peers, size, s, coef = sums_case(op, elements, dtype, device)
    user = None
    if own and op in own.functions:
        user, given = own.bind(op, [s.clone()], coef, {}), own.takes_z(op)
    peers = {(name, z): f for (name, z), f in peers.items()
             if name in named and not PEERS[name].lacks(None, dtype, device != "cpu")
             and (not z or user and given)}
    ours = {name: make(name) for name in names}

    def check(when, **counter):
        if op == "corrector":
            for name in names:
                check_corrector(name, corrector(name), s)
            return
        want = expected_sums(op, s, coef)
        for name, f in ours.items():
            got = f()
            require_same(op, name, got if isinstance(got, tuple) else (got,), want, when)
        if user:
            want = expected_sums(op, s, coef, **COUNTER | counter)
            own.require(op, user, want, when)
    check("nothing was timed")
    functions = {(name, False): f for name, f in ours.items()} | peers
    copied, out = s.clone(), s.clone()
    extra = {"copy": lambda: out.copy_(copied)}
    if user:
        functions[own.file, given] = own.timed(user)
        arrays = size // s.nbytes + given
        extra |= yardsticks(s, max(1, arrays))
    times = times_of(functions | extra, device, seconds)
    refresh([s], seed + 1)
    if user:
        own.renew(user, op, [s], 1)
    check(AFTER, step=1)
    copy_rate, found = 2 * s.nbytes / times["copy"]["seconds"], []
    for name, z in functions:
        t, peer = times[name, z], name not in ours and not (user and name == own.file)
        moved = size + z * 4 * s.numel()  # z is float32
        if user and name == own.file:
            require_possible(op, name, t, moved, False, s.nbytes, max(1, arrays), times)
        rate = None if peer else moved / t["seconds"]
        found.append(row_of(op, name, dtype, s.shape, **t, bytes=None if peer else moved,
                            given_z=z, gb_per_s=rate and rate / 1e9,
                            fraction_of_copy=rate and rate / copy_rate,
                            matches_reference=None if peer else True))
    return add_speedups(found)
