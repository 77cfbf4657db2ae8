"""Langevin dynamics, and its annealed form: with denoising score matching, SMLD."""

import numpy as np

from .affine import check_domain, check_range, schedule


def langevin_step(x, s, z, /, eps):
    """x' = x + (eps / 2) s + sqrt(eps) z, s = grad log p(x). [SMLD: Song & Ermon 2019, eq. 4]"""
    return x + eps / 2 * s + eps**.5 * z


def noise_levels(n=10, sigma_max=1., sigma_min=.01):
    """n levels from sigma_max down to sigma_min, a geometric sequence. [SMLD sec. 4.1]"""
    low, high = check_range(n=n, sigma_min=sigma_min, sigma_max=sigma_max)
    return np.geomspace(high, low, n)


def rho_levels(n, sigma_max, sigma_min, rho=7.):
    """(smax^(1/rho) + i/(n-1) (smin^(1/rho) - smax^(1/rho)))^rho, n levels that fall and crowd
    at the small end, both ends exact, rho > 0. [EDM: Karras et al. 2022, eq. 5]"""
    low, high = check_range(n=n, least=2, sigma_min=sigma_min, sigma_max=sigma_max)
    rho = check_domain(rho=rho)["rho"]
    levels = np.linspace(high**(1 / rho), low**(1 / rho), n)**rho
    levels[[0, -1]] = high, low
    return levels


def falling(levels, name="sigmas"):
    """levels in float64, (L,), positive and falling, or ValueError."""
    levels = schedule(levels, name)
    if not (np.diff(levels, append=0.) < 0).all():
        raise ValueError(f"{name} must be positive and fall from level to level")
    return levels


def step_sizes(sigmas, eps=2e-5):
    """alpha_i = eps sigma_i^2 / sigma_L^2, one a level. [SMLD Algorithm 1]

    The published code steps x + alpha s + sqrt(2 alpha) z, which is twice this eps.
    """
    sigmas = falling(sigmas)
    eps = check_domain(eps=eps)["eps"]
    return eps * sigmas**2 / sigmas[-1]**2
