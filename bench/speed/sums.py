"""What adds up squares, timed: norms, the loss with its gradient, the corrector."""

from functools import partial

import numpy as np
import torch

from ... import noise
from ...kernels import BACKENDS, Fused
from ...kernels.check.cases import COUNTER, sums_of
from ...kernels.check.compare import expected_sums, in_parts, normals
from ...langevin import langevin_step
from ...samplers import Reference
from ...solvers import snr_step_size
from .rows import shape_of
from .timed import Entrant, Race

TAG = noise.CORRECTOR
# arrays that ours reads and writes
PASSES = {"norms": 1, "noise_norms": 0, "dsm_loss": 2, "corrector": 4}
SUMS = tuple(PASSES)
_DRAWN = [("torch_eager", False), ("torch_inplace", False), ("torch_compile", False)]
FORMS = {  # of peers, and whether z is given
    "norms": _DRAWN[:1],
    "noise_norms": [*_DRAWN[:2], ("torch_eager", True)],
    "dsm_loss": [*_DRAWN, ("torch_eager", True), ("torch_compile", True)],
    "corrector": _DRAWN}


def composed(s, coef, z):
    """The denoising loss of torch operations."""
    e = coef[:, :1] * s + coef[:, 1:2] * z
    return (coef[:, 2] * e.square().sum(1)).sum()


def loss_and_gradient(s, coef, draw, loss):
    """Its value, and its gradient by autograd."""
    s = s.detach().requires_grad_()
    value = loss(s, coef, draw())
    value.backward()
    return value, s.grad


def step_size(s, z, snr=.16):
    """alpha of each sample, (B, 1)."""
    return 2 * (snr * z.norm(dim=1) / s.norm(dim=1)).square()[:, None]


def corrected(x, s, z):
    """One Langevin correction with each sample's own step size, of torch operations."""
    alpha = step_size(s, z)
    return x + alpha * s + (2 * alpha).sqrt() * z


def corrected_inplace(x, s, z):
    """The same in x's own memory."""
    alpha = step_size(s, z)
    return x.addcmul_(s, alpha).addcmul_(z, (2 * alpha).sqrt())


def compiled(f):
    """torch.compile of f, z drawn outside the graph, as for the updates."""
    torch._dynamo.reset()
    return torch.compile(f, dynamic=False, fullgraph=True)


def check_correction(name, got, s, z):
    """RuntimeError unless a correction of ones is the reference's with z, whole: float32
    rounds its terms, and the norms in their coefficients, by less than 2^-20 of them."""
    eps = max(2.**-20, 4 * torch.finfo(s.dtype).eps)

    def good(rows):
        found, s64, z64 = (u[rows].cpu().double().numpy() for u in (got, s, z))
        reference = Reference(normal=lambda *_: z64)
        correct = reference.corrector(langevin_step, snr_step_size, TAG)
        want = correct(0, np.ones_like(s64), s64)
        return (abs(found - want) <= eps * (3 + abs(want))).all()
    if not all(in_parts(good, *s.shape)):
        raise RuntimeError(f"corrector: {name} does not follow the reference; what was timed is "
                           "not reported")


class Corrections(Race):
    """Held to the reference within a bound: a correction follows norms, which are to an
    ulp."""

    def check(self, when, step):
        """As `check_correction`, of the same counter whenever it is."""
        s, = self.u
        z = normals(tuple(s.shape), tag=TAG)
        for (name, _), entrant in self.entrants.items():
            if entrant.results:
                check_correction(name, entrant.results(torch.ones_like(s), s), s, z)


def form(op, name, given, x, s, z, coef):
    """A peer's call: z is given, drawn anew by torch_eager, and into its memory by the
    others."""
    draw = partial(torch.randn_like, s) if name == "torch_eager" else z.normal_
    if given:
        draw = lambda: z
    compiler = compiled if name == "torch_compile" else lambda f: f
    if op == "norms":
        return lambda: s.norm(dim=1)
    if op == "noise_norms":
        return lambda: draw().norm(dim=1)
    if op == "dsm_loss":
        return partial(loss_and_gradient, s, coef, draw, compiler(composed))
    correct = corrected_inplace if name == "torch_inplace" else compiler(corrected)
    other, state = torch.randn_like(s), x.clone()
    check_correction(name, correct(torch.ones_like(s), s, other), s, other)
    return lambda: correct(state, s, draw())


def sums_race(op, names, elements, *, dtype, device, seed, width, user_kernels):
    """One of SUMS at a size: norms, `dsm_loss` (value and gradient) and `corrector` (norms,
    then the step in place), against torch's forms."""
    torch.manual_seed(seed)
    shape, kind = shape_of(elements, width), getattr(torch, dtype)
    x, s, z = (torch.randn(shape, device=device).to(kind) for _ in "xsz")
    coef = torch.rand((shape[0], 3), device=device)

    def expected(u, **counter):
        return expected_sums(op, u[0], coef, **counter)

    race_of = Corrections if op == "corrector" else Race
    race = race_of(op, [s], s.clone(), PASSES[op] * s.nbytes, expected)
    for name in names:
        if name in BACKENDS and op == "corrector":
            engine = Fused(backend=name)
            correct = partial(engine.corrector(langevin_step, snr_step_size, TAG), 0)
            call = partial(correct, x.clone(), s)
            race.entrants[name, False] = Entrant(call, race.bytes, True, results=correct)
        elif name in BACKENDS:
            race.enter(name, partial(sums_of, op, s, coef, name, **COUNTER))
    user_given = race.enter_user(user_kernels, coef, {})
    for name, given in FORMS[op]:
        if name in names and given <= user_given:
            race.entrants[name, given] = Entrant(form(op, name, given, x, s, z, coef))
    return race
