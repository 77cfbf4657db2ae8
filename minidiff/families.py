"""Every sampler family from one score s(x, sigma) of x_0 + sigma z, trained or exact.

At equal sigma / a all processes are one, scaled. So a network that knows the score of
x_0 + sigma z knows every process's: `predictions.rescaled`. The samplers of all chapters
then differ in nothing but their steps and levels, and may be compared. With this the
chapters end. Next: `noise` and `affine`, what carries them, and the kernels' own page.

A family is a generator f(score, z, n, engine) of its process's states, the last one
denoised. The start is z ~ N(0, I) before it is scaled to the prior, n is about the number
of score evaluations, and an engine is as in minidiff.samplers. Noise levels lie by EDM's
rule in sigma / a, from a process's end down to SIGMA_MIN, for data in [-1, 1]; those of
flow_matching are even in t, down to 0.
"""

from functools import partial

import numpy as np

from . import ddpm, samplers
from .predictions import rescaled
from .sde import EDM, VE, VP, FlowMatching, SubVP, prior_std
from .solvers import rho_levels

SIGMA_MIN = .01


def annealed_langevin(score, z, n, engine):
    """SMLD: n // 3 levels of 3 steps, step sizes alpha_i = (.7 sigma_i)^2. [SMLD Alg. 1]"""
    sigmas = rho_levels(max(2, n // 3), 10., .02)
    last = sigmas[-1]
    for x in samplers.annealed_langevin(score, 10. * z, sigmas, engine,
                                        eps=(.7 * last)**2, n_steps=3):
        yield x
    yield samplers.denoise(score, x, last, engine, a=1., sigma=last)


def _discrete(loop):
    """A family in discrete time, from loop(score, z, alpha_bar, engine).

    Its n levels start where DDPM's 1000 steps end. A level's sigma / a gives
    alpha_bar = 1 / (1 + (sigma / a)^2), and the given score becomes score(x, i) of
    x = sqrt(alpha_bar_i) x_0 + sqrt(1 - alpha_bar_i) z.
    """
    def family(score, z, n, engine):
        last = ddpm.alpha_bars(ddpm.linear_betas())[-1]
        start = ((1 - last) / last)**.5
        levels = rho_levels(max(2, n), start, SIGMA_MIN)
        alpha_bar = 1 / (1 + levels[::-1]**2)
        score_i = rescaled(score, lambda i: ddpm.marginal(alpha_bar[i]))
        return loop(score_i, z, alpha_bar, engine)
    return family


def _ancestral(score, z, alpha_bar, engine):
    """DDPM on those levels, with variance beta~. [DDPM Alg. 2; iDDPM]"""
    betas = ddpm.subset_betas(alpha_bar)
    variances = ddpm.posterior_variances(betas)
    return samplers.ancestral(score, z, betas, engine, variances)


def _by_rule(sde, n):
    """n times from T down, two at least, whose sigma / a are EDM's levels."""
    a, sigma = sde.marginal(sde.T)
    times = sde.time(rho_levels(max(2, n), sigma / a, SIGMA_MIN))
    times[0] = sde.T
    return times


def _even(sde, n):
    """n even steps from T to 0, where flow matching begins and ends."""
    return np.linspace(sde.T, 0, n + 1)


def _own_chain(sde, n):
    """The times of an SDE's own chain of n - 1 steps, three at least, and the one after.

    There sigma / a is the G of the chain's first step.
    """
    steps = max(3, n - 1)
    # sigma_i is VE's at i / (steps - 1), alpha_bar_i VP's at (i + 1) / steps
    low = 1e-5 if isinstance(sde, VE) else 1 / steps
    _, G = sde.discretize(0., 0, steps)
    return np.append(sde.T * np.linspace(1, low, steps), sde.time(G))


def _short_steps(grid, sde, n):
    """grid(sde, n), or that of the fewest times above n, so that every step has kappa > 0.

    VP's kappa is 1 - beta dt: its chain takes the root of it, and the corrector's step size
    is proportional to it. The other processes have kappa = 1.
    """
    times = grid(sde, n)
    kappa = sde.kappa(times[:-1], -np.diff(times))
    return times if (kappa > 0).all() else _short_steps(grid, sde, n + 1)


def _in_time(loop, sde, grid=_by_rule, per_step=1, leaves_noise=True):
    """A family in the time of an SDE, from loop(score, x, sde, times, engine).

    grid(sde, n) gives the times; a step takes per_step evaluations of the score, so it is
    asked for n // per_step. The given score becomes score(x, t) of the process's own x_t.
    Where the last step leaves noise, a denoised state follows.
    """
    def family(score, z, n, engine):
        times = grid(sde, n // per_step)
        score_t = rescaled(score, sde.marginal)
        for x in loop(score_t, prior_std(sde) * z, sde, times, engine):
            yield x
        if leaves_noise:
            a, sigma = map(float, sde.marginal(times[-1]))
            yield samplers.denoise(score_t, x, times[-1], engine, a=a, sigma=sigma)
    return family


def _adaptive(score, x, sde, times, engine):
    """RK45, which computes in NumPy, with a score of arrays or tensors like x.

    The tolerance is for about as many evaluations as times: 24 a decade, on the digits.
    ValueError for seeds a row: the step size is the batch's.
    """
    engine.require_one_seed("pf_ode_adaptive")

    def as_given(u):
        return x.new_tensor(u) if hasattr(x, "new_tensor") else u.astype(x.dtype)

    def in_float64(u):
        return u.double().cpu().numpy() if hasattr(u, "cpu") else u.astype(np.float64)

    def score_in_float64(u, t):
        return in_float64(engine.whole(score(as_given(u), t)))
    tolerance = 10**-min(8., (len(times) + 9) / 24)
    states = samplers.pf_ode_adaptive(score_in_float64, in_float64(x), sde, times,
                                      rtol=tolerance, atol=tolerance)
    yield from map(as_given, states)


def _in_sigma(loop, per_step=1):
    """A family in the noise level, from loop(score, x, sigmas, engine).

    A step takes per_step evaluations, so there are n / per_step of EDM's levels, rounded
    up. The given score is used as it is.
    """
    def family(score, z, n, engine):
        T = EDM().T
        levels = rho_levels(max(2, -(-n // per_step)), T, SIGMA_MIN)
        return loop(score, T * z, levels, engine)
    return family


_corrected = partial(samplers.predictor_corrector, corrector="annealed")
FAMILIES = {
    "annealed_langevin": annealed_langevin,
    "ddpm_ancestral": _discrete(_ancestral),
    "ddim": _discrete(samplers.ddim),
    "reverse_sde_ve": _in_time(samplers.reverse_sde, VE()),
    "reverse_sde_vp": _in_time(samplers.reverse_sde, VP()),
    "reverse_sde_subvp": _in_time(samplers.reverse_sde, SubVP()),
    "reverse_sde_flow": _in_time(samplers.reverse_sde, FlowMatching()),
    "reverse_diffusion_ve": _in_time(samplers.reverse_diffusion, VE(), _own_chain),
    "reverse_diffusion_vp": _in_time(samplers.reverse_diffusion, VP(),
                                     partial(_short_steps, _own_chain)),
    "ancestral_ve": _in_time(samplers.ancestral_sde, VE(), _own_chain, leaves_noise=False),
    "pc_ve": _in_time(_corrected, VE(), per_step=2),
    "pc_vp": _in_time(_corrected, VP(), partial(_short_steps, _by_rule), per_step=2),
    "pc_subvp": _in_time(_corrected, SubVP(), per_step=2),
    "pf_ode": _in_time(samplers.pf_ode, VP()),
    "pf_ode_adaptive": _in_time(_adaptive, VP()),
    "flow_matching": _in_time(samplers.pf_ode, FlowMatching(), _even, leaves_noise=False),
    "heun": _in_sigma(samplers.edm, per_step=2),
    "edm_churn": _in_sigma(partial(samplers.edm, s_churn=20.), per_step=2),
    "dpmpp_2m": _in_sigma(samplers.dpmpp_2m),
}
