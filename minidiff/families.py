"""Every sampler family from one score s(x, sigma) of x_0 + sigma z, trained or exact.

A family is f(score, z, n, op): z ~ N(0, I) the start before its prior's scale, n about the number
of score evaluations, op as in minidiff.samplers. It yields the process's states, the last denoised.
Noise levels lie by EDM's rule in sigma / a from SIGMA_MIN to a process's end, for data in [-1, 1].
"""

from functools import partial

import numpy as np

from . import ddpm, samplers
from .predictions import rescaled
from .sde import EDM, VE, VP, SubVP, prior_std
from .solvers import rho_levels

SIGMA_MIN = .01


def annealed_langevin(score, z, n, op):
    """SMLD: n // 3 levels of 3 steps, step sizes alpha_i = (.7 sigma_i)^2. [SMLD Alg. 1]"""
    sigmas = rho_levels(max(2, n // 3), 10., .02)
    for x in samplers.annealed_langevin(score, 10. * z, sigmas, op, (.7 * sigmas[-1])**2, 3):
        yield x
    yield samplers.denoise(score, x, sigmas[-1], op, 1., sigmas[-1])


def _discrete(loop):
    """A loop over the alpha_bar of n levels, the first that of DDPM's 1000 steps."""
    def family(score, z, n, op):
        last = ddpm.alpha_bars(ddpm.linear_betas())[-1]
        levels = rho_levels(max(2, n), ((1 - last) / last)**.5, SIGMA_MIN)
        alpha_bar = 1 / (1 + levels[::-1]**2)
        at = rescaled(score, lambda i: (alpha_bar[i]**.5, (1 - alpha_bar[i])**.5))
        return loop(at, z, alpha_bar, op)
    return family


def _ancestral(score, z, alpha_bar, op):
    """DDPM on those levels, variance beta~. [DDPM Alg. 2; iDDPM eq. 19]"""
    betas = ddpm.subset_betas(alpha_bar)
    return samplers.ancestral(score, z, betas, op, ddpm.posterior_variances(betas))


def _in_time(loop, sde, per_step=1, chain=False, least=2, leaves_noise=True):
    """A loop over times of an SDE, n / per_step of them by EDM's rule or its own chain's; at least
    `least`: longer steps have beta dt >= 1. A last step that leaves noise is denoised."""
    def family(score, z, n, op):
        n, (a, sigma) = max(least, n // per_step), sde.marginal(sde.T)
        times = sde.time(rho_levels(n, sigma / a, SIGMA_MIN))
        times[0] = sde.T
        if chain:  # sigma_i is VE's at i / (n - 2), alpha_bar_i VP's at (i + 1) / (n - 1)
            low = 1e-5 if isinstance(sde, VE) else 1 / (n - 1)
            times = np.append(np.linspace(1, low, n - 1),
                              sde.time(sde.discretize(0., 0, n - 1)[1]))
        at = rescaled(score, sde.marginal)
        for x in loop(at, prior_std(sde) * z, sde, times, op):
            yield x
        if leaves_noise:
            yield samplers.denoise(at, x, times[-1], op, *map(float, sde.marginal(times[-1])))
    return family


def _adaptive(score, x, sde, times, op):
    """RK45, which computes in NumPy, of a score of arrays or tensors like x. The tolerance is for
    about as many evaluations as times: 24 a decade, on the digits."""
    def like(u):
        return x.new_tensor(u) if hasattr(x, "new_tensor") else u.astype(x.dtype)

    def host(u):
        return np.asarray(u.cpu() if hasattr(u, "cpu") else u, np.float64)
    tolerance = 10**-min(8., (len(times) + 9) / 24)
    states = samplers.pf_ode_adaptive(lambda u, t: host(score(like(u), t)), host(x), sde, times,
                                      tolerance, tolerance)
    yield from map(like, states)


def _in_sigma(loop, per_step=1):
    """A loop over EDM's levels, of n / per_step steps rounded up."""
    return lambda score, z, n, op: loop(score, EDM().T * z, rho_levels(
        max(2, -(-n // per_step)), EDM().T, SIGMA_MIN), op)


PC = partial(samplers.predictor_corrector, corrector="annealed")
FAMILIES = {
    "annealed_langevin": annealed_langevin,
    "ddpm_ancestral": _discrete(_ancestral),
    "ddim": _discrete(samplers.ddim),
    "reverse_sde_ve": _in_time(samplers.reverse_sde, VE()),
    "reverse_sde_vp": _in_time(samplers.reverse_sde, VP()),
    "reverse_sde_subvp": _in_time(samplers.reverse_sde, SubVP()),
    "reverse_diffusion_ve": _in_time(samplers.reverse_diffusion, VE(), chain=True, least=4),
    "reverse_diffusion_vp": _in_time(samplers.reverse_diffusion, VP(), chain=True, least=23),
    "ancestral_ve": _in_time(samplers.ancestral_sde, VE(), chain=True, least=4, leaves_noise=False),
    "pc_ve": _in_time(PC, VE(), 2),
    "pc_vp": _in_time(PC, VP(), 2, least=20),
    "pc_subvp": _in_time(PC, SubVP(), 2),
    "pf_ode": _in_time(samplers.pf_ode, VP()),
    "pf_ode_adaptive": _in_time(_adaptive, VP()),
    "heun": _in_sigma(samplers.edm, 2),
    "edm_churn": _in_sigma(partial(samplers.edm, s_churn=20.), 2),
    "dpmpp_2m": _in_sigma(samplers.dpmpp_2m),
}
