"""diffusers' schedulers beside the steps of the reference that they compute.

SCHEDULERS is keyed by the reference's function. A scheduler works on x = scale y, y the
reference's state, and on the network's noise eps = -sigma s; which scale, sigma and which
parameters of the step belong to the middle of its own schedule it tells here, so that its
step is checked against the reference before it is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from ... import ddpm, sde, solvers
from ...affine import accepted_by
from ...kernels.check.cases import CLIP
from ..speed.work import is_sum

SEED = 5


@dataclass(frozen=True)
class Scheduler:
    """name and config in diffusers; steps of set_timesteps; options of its step.

    passes: the arrays its step reads and writes, randn apart.
    at(scheduler) -> (parameters, [(scale, sigma) now, then before for a multistep solver],
    scale after). The reference's step takes those of the parameters that it has.
    """

    name: str
    at: Callable
    passes: int
    config: dict = field(default_factory=dict)
    steps: int = 0
    options: dict = field(default_factory=dict)

    def make(self):
        """The scheduler, ready for `step`."""
        s = scheduler(self.name, self.steps, **self.config)
        s.is_scale_input_called = True  # what scale_model_input does for Euler
        return s


def scheduler(name, steps, device=None, **config):
    """One of diffusers', set to so many steps, if any."""
    import diffusers
    found = getattr(diffusers, name)(**config)
    if steps:
        found.set_timesteps(steps, device=device)
    return found


T = 500  # in the middle of the schedule's 1000


def _chain(s):
    """What any step of the chain at T takes."""
    alpha_bar, before = float(s.alphas_cumprod[T]), float(s.alphas_cumprod[T - 1])
    beta = 1 - alpha_bar / before
    parameters = {"alpha_bar": alpha_bar, "alpha_bar_prev": before, "beta": beta,
                  "variance": (1 - before) / (1 - alpha_bar) * beta, "eta": 1.}
    return parameters, [(1., (1 - alpha_bar)**.5)], 1.


K = 10  # in the middle of 20 steps


def _euler(s):
    """sigma to sigma' is the flow of any SDE whose g^2 dt / 2 = sigma (sigma - sigma')."""
    sigma, after = map(float, s.sigmas[K:K + 2])
    ve = sde.VE()
    t = ve.time(sigma)
    dt = 2 * sigma * (sigma - after) / ve.diffusion(t)**2
    return {"sde": ve, "t": t, "dt": dt}, [(1., sigma)], 1.


def _multistep(s):
    """In the variance-preserving form, scale = 1 / sqrt(1 + sigma^2)."""
    before, now, after = map(float, s.sigmas[K - 1:K + 2])
    scales = [(1 + sigma**2)**-.5 for sigma in (now, before, after)]
    parameters = {"sigma_prev": before, "sigma": now, "sigma_next": after}
    return parameters, list(zip(scales, (now, before))), scales[2]


SCHEDULERS = {
    ddpm.ancestral_step: Scheduler("DDPMScheduler", _chain, 19, {"clip_sample": False}),
    ddpm.posterior_step: Scheduler("DDPMScheduler", _chain, 21),
    ddpm.ddim_step: Scheduler("DDIMScheduler", _chain, 19, {"clip_sample": False}, 1000,
                              {"eta": 1.}),
    sde.pf_ode_step: Scheduler("EulerDiscreteScheduler", _euler, 15, steps=20),
    solvers.dpmpp_2m_step: Scheduler("DPMSolverMultistepScheduler", _multistep, 24,
                                     steps=20),
}


def _step(entry, s, **more):
    """step(eps, x, k): one step at index k of the schedule, no matter which came before."""
    options = {"return_dict": False, **entry.options, **more}
    if not hasattr(s, "sigmas"):
        return lambda eps, x, k: s.step(eps, T, x, **options)[0]
    times = list(s.timesteps)

    def step(eps, x, k):
        s._step_index = k
        return s.step(eps, times[k], x, **options)[0]
    return step


def timed(function, u):
    """f() makes the step that the reference calls `function`, of operands u, as they
    are."""
    entry = SCHEDULERS[function]
    step = _step(entry, entry.make())
    if len(u) > 2:  # a multistep solver remembers the step before
        step(u[3], u[2], K - 1)
    return partial(step, u[1], u[0], K)


def check(op, u):
    """RuntimeError where the scheduler's step is not the op's, with the same z."""
    entry, x, draw, z = SCHEDULERS[op.step], u[0], {}, []
    s = entry.make()
    parameters, scales, after = entry.at(s)
    if op.noise:
        generator = torch.Generator(x.device).manual_seed(SEED)
        z = [torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)]
        draw["generator"] = generator.manual_seed(SEED)
    step = _step(entry, s, **draw)
    pairs = zip(scales, u[::2], u[1::2])
    for k, ((scale, sigma), y, score) in reversed(list(enumerate(pairs))):
        got = step(-sigma * score, scale * y, K - k)
    coef = op.coefficients(CLIP if op.denoise else None, **accepted_by(op.step, parameters))
    # its inner terms are of the operands' size; the schedule is float32, where 1 - alpha_bar
    # / alpha_bar_prev and exp(-h) - 1, from about .01 on, lose two digits; then some twenty
    # roundings to the storage's dtype
    error = 20 * torch.finfo(x.dtype).eps + 2.**-24 / .005
    if not is_sum(got.double() / after, [*u, *z], coef.tolist(), error, least=1.):
        raise RuntimeError(f"diffusers' {entry.name} computes another {op.step.__name__} than "
                           "the reference")
