"""Every sampler family from one score s(x, sigma) of x_0 + sigma z, trained or exact.

A family is f(score, z, n, op): z ~ N(0, I) the start before its prior's scale, n about the
number of score evaluations, op as in minidiff.sample. It yields states in the data's own
scale, the last one denoised. Noise levels are placed by EDM's rule in sigma / a between
SIGMA_MIN and what each process ends at, for data within about [-1, 1].
"""

import numpy as np

from . import ddpm, sample
from .langevin import rho_levels
from .sde import VE, VP, SubVP, prior_std, rescaled_score

SIGMA_MIN = .01


def _ending(score, states, level, op, a, sigma):
    """The states, rescaled to the data, then the denoised last one."""
    for x in states:
        yield x / a
    yield sample.denoise(score, x, level, op, a, sigma)


def annealed_langevin(score, z, n, op, sigma_max=10., sigma_min=.02, n_steps=3, r=.7):
    """SMLD: n // n_steps levels, step sizes alpha_i = (r sigma_i)^2. [SMLD Alg. 1]"""
    sigmas = rho_levels(max(2, n // n_steps), sigma_max, sigma_min)
    states = sample.annealed_langevin(score, sigma_max * z, sigmas, op,
                                      (r * sigmas[-1])**2, n_steps)
    return _ending(score, states, sigmas[-1], op, 1., sigmas[-1])


def _ddpm_grid(n):
    """alpha_bar of the n indices of DDPM's 1000 nearest to EDM's levels."""
    alpha_bar = ddpm.alpha_bars(ddpm.linear_betas())
    ratio = ((1 - alpha_bar) / alpha_bar)**.5
    levels = rho_levels(max(2, n), ratio[-1], ratio[0])
    return alpha_bar[np.unique(np.abs(np.log(ratio)[:, None] - np.log(levels)).argmin(0))]


def _discrete(score, n):
    """(s(x, i), alpha_bar) of the chain on n indices."""
    alpha_bar = _ddpm_grid(n)
    return lambda x, i: rescaled_score(score, alpha_bar[i]**.5, (1 - alpha_bar[i])**.5)(x), \
        alpha_bar


def ddpm_ancestral(score, z, n, op):
    """DDPM on n of its 1000 indices, variance beta~. [DDPM Alg. 2; iDDPM eq. 19]"""
    at, alpha_bar = _discrete(score, n)
    betas = ddpm.subset_betas(alpha_bar)
    return sample.ancestral(at, z, betas, op, ddpm.posterior_variances(betas))


def ddim(score, z, n, op):
    """DDIM (eta = 0) on n of DDPM's 1000 indices. [DDIM eq. 12]"""
    at, alpha_bar = _discrete(score, n)
    return sample.ddim(at, z, alpha_bar, op)


def _continuous(loop, sde):
    def family(score, z, n, op):
        a, sigma = sde.marginal(sde.T)
        times = sde.time(rho_levels(max(2, n), sigma / a, SIGMA_MIN))
        times[0] = sde.T
        at = lambda x, t: rescaled_score(score, *sde.marginal(t))(x)
        states = loop(at, prior_std(sde) * z, sde, times, op)
        return _ending(at, states, times[-1], op, *map(float, sde.marginal(times[-1])))
    family.__doc__ = f"{type(sde).__name__}: sample.{loop.__name__} on n - 1 steps."
    return family


FAMILIES = {
    "annealed_langevin": annealed_langevin,
    "ddpm_ancestral": ddpm_ancestral,
    "ddim": ddim,
    "reverse_sde_ve": _continuous(sample.reverse_sde, VE()),
    "reverse_sde_vp": _continuous(sample.reverse_sde, VP()),
    "reverse_sde_subvp": _continuous(sample.reverse_sde, SubVP()),
    "pf_ode": _continuous(sample.pf_ode, VP()),
}
