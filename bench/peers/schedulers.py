"""diffusers' schedulers beside the steps of the reference that they compute.

SCHEDULERS is keyed by the reference's function. A scheduler works on x = scale y, y the
reference's state, and on the network's noise eps = -sigma s; which scale, sigma and which
parameters of the step belong to the middle of its own schedule it tells here, so that its step
is checked against the reference before it is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from inspect import signature

import numpy as np
import torch

from ... import ddpm, sde, solvers

SEED = 5


@dataclass(frozen=True)
class Scheduler:
    """name and config in diffusers; passes: the arrays its step reads and writes, randn apart.
    at(scheduler) -> (parameters of the reference's step, (scale, sigma) now, then one before
    for a multistep solver, scale after). steps: of set_timesteps."""

    name: str
    at: Callable
    passes: int
    config: dict = field(default_factory=dict)
    steps: int = 0
    eta: float | None = None
    denoise: Callable | None = None

    def make(self):
        """The scheduler, ready for `step`."""
        import diffusers
        s = getattr(diffusers, self.name)(**self.config)
        if self.steps:
            s.set_timesteps(self.steps)
        s.is_scale_input_called = True  # what scale_model_input does for Euler
        return s


T = 500  # in the middle of the schedule's 1000


def _chain(s):
    alpha_bar, before = float(s.alphas_cumprod[T]), float(s.alphas_cumprod[T - 1])
    beta = 1 - alpha_bar / before
    return alpha_bar, before, beta, (1 - before) / (1 - alpha_bar) * beta


def _ancestral(s):
    alpha_bar, _, beta, variance = _chain(s)
    return {"beta": beta, "variance": variance}, [(1., (1 - alpha_bar)**.5)], 1.


def _posterior(s):
    alpha_bar, before, _, variance = _chain(s)
    return {"alpha_bar": alpha_bar, "alpha_bar_prev": before, "variance": variance}, \
        [(1., (1 - alpha_bar)**.5)], 1.


def _ddim(s):
    alpha_bar, before, _, _ = _chain(s)
    return {"alpha_bar": alpha_bar, "alpha_bar_prev": before, "eta": 1.}, \
        [(1., (1 - alpha_bar)**.5)], 1.


K = 10  # in the middle of 20 steps


def _euler(s):
    """sigma to sigma' is the flow of any SDE whose g^2 dt / 2 = sigma (sigma - sigma')."""
    sigma, after = map(float, s.sigmas[K:K + 2])
    t = sde.VE().time(sigma)
    dt = 2 * sigma * (sigma - after) / sde.VE().diffusion(t)**2
    return {"sde": sde.VE(), "t": t, "dt": dt}, [(1., sigma)], 1.


def _multistep(s):
    """In the variance-preserving form, scale = 1 / sqrt(1 + sigma^2)."""
    before, now, after = map(float, s.sigmas[K - 1:K + 2])
    scale = lambda sigma: (1 + sigma**2)**-.5
    return {"sigma_prev": before, "sigma": now, "sigma_next": after}, \
        [(scale(now), now), (scale(before), before)], scale(after)


SCHEDULERS = {
    ddpm.ancestral_step: Scheduler("DDPMScheduler", _ancestral, 19, {"clip_sample": False}),
    ddpm.posterior_step: Scheduler("DDPMScheduler", _posterior, 21, denoise=ddpm.predicted_x0),
    ddpm.ddim_step: Scheduler("DDIMScheduler", _ddim, 19, {"clip_sample": False}, 1000, 1.),
    sde.pf_ode_step: Scheduler("EulerDiscreteScheduler", _euler, 15, steps=20),
    solvers.dpmpp_2m_step: Scheduler("DPMSolverMultistepScheduler", _multistep, 24, steps=20),
}


def _step(entry, s, generator=None):
    """step(eps, x, k): one step at index k of the schedule, no matter which came before."""
    more = {"return_dict": False} | ({} if generator is None else {"generator": generator}) \
        | ({} if entry.eta is None else {"eta": entry.eta})
    if not hasattr(s, "sigmas"):
        return lambda eps, x, k=K: s.step(eps, T, x, **more)[0]
    times = list(s.timesteps)

    def step(eps, x, k=K):
        s._step_index = k
        return s.step(eps, times[k], x, **more)[0]
    return step


def timed(function, u):
    """f() makes the step that the reference calls `function`, of operands u, as they are."""
    entry = SCHEDULERS[function]
    step, (x, eps, *before) = _step(entry, entry.make()), u
    if before:
        step(before[1], before[0], K - 1)
    return lambda: step(eps, x)


def check(function, u):
    """RuntimeError where the scheduler's step is not the reference's, with the same z."""
    entry, z = SCHEDULERS[function], None
    s = entry.make()
    parameters, scales, after = entry.at(s)
    draws = "z" in signature(function).parameters
    generator = torch.Generator(u[0].device).manual_seed(SEED) if draws else None
    step = _step(entry, s, generator)
    pairs = [(scale * y, -sigma * v) for (scale, sigma), y, v in zip(scales, u[::2], u[1::2])]
    for (x, eps), k in reversed(list(zip(pairs, (K, K - 1)))):
        got = step(eps, x, k)
    if draws:
        generator = generator.manual_seed(SEED)
        z = torch.randn(u[0].shape, generator=generator, device=u[0].device, dtype=u[0].dtype)
    _compare(function, entry, parameters, u, z, got.double() / after)


def _compare(function, entry, parameters, u, z, got):
    own = lambda f: {n: v for n, v in parameters.items() if n in signature(f).parameters}
    v = [t.double() for t in u]
    if entry.denoise:
        v[1] = entry.denoise(*v, **own(entry.denoise)).clamp(-1, 1)
    v += [] if z is None else [z.double()]
    reference = partial(function, **own(function))
    scale = sum(max(abs(reference(*unit)), 1) * t.abs()
                for unit, t in zip(np.eye(len(v)).tolist(), v))
    # its inner terms are of the operands' size; the schedule is float32, where 1 - alpha_bar /
    # alpha_bar_prev and exp(-h) - 1, from about .01 on, lose two digits; then some twenty roundings
    # to the storage's dtype
    bound = (20 * torch.finfo(u[0].dtype).eps + 2.**-24 / .005) * scale
    if not ((got - reference(*v)).abs() <= bound).all():
        raise RuntimeError(f"diffusers' {entry.name} computes another {function.__name__} than "
                           "the reference")
