"""Langevin dynamics, and its annealed form: with denoising score matching, SMLD."""

import numpy as np

from .arguments import check_domain, check_falling, check_range


def langevin_step(x, s, z, /, eps):
    """x' = x + (eps / 2) s + sqrt(eps) z. [SMLD: Song & Ermon 2019, eq. 4]

    s = grad log p(x), z ~ N(0, I), eps > 0.
    """
    return x + eps / 2 * s + eps**.5 * z


def noise_levels(n=10, sigma_max=1., sigma_min=.01):
    """n levels from sigma_max down to sigma_min, geometric, (n,). [SMLD sec. 4.1]"""
    low, high = check_range(n=n, sigma_min=sigma_min, sigma_max=sigma_max)
    return np.geomspace(high, low, n)


def step_sizes(sigmas, eps=2e-5):
    """alpha_i = eps sigma_i^2 / sigma_L^2, one a level. [SMLD Algorithm 1]

    sigmas: (L,), falling; eps > 0. The published code steps x + alpha s + sqrt(2 alpha) z,
    which is twice this eps.
    """
    sigmas = check_falling(sigmas)
    eps = check_domain(eps=eps)["eps"]
    return eps * sigmas**2 / sigmas[-1]**2
