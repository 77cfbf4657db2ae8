"""Langevin dynamics, and its annealed form: with denoising score matching, SMLD."""

import numpy as np


def langevin_step(x, s, z, /, eps):
    """x' = x + (eps / 2) grad log p(x) + sqrt(eps) z. [SMLD: Song & Ermon 2019, eq. 4]

    x, s, z: same shape, s the score at x, z ~ N(0, I); eps > 0 the step size.
    """
    return x + eps / 2 * s + eps**.5 * z


def _check_levels(n, least, sigma_max, sigma_min):
    if n < least or not 0 < sigma_min < sigma_max < np.inf:
        raise ValueError(f"need n >= {least} and 0 < sigma_min < sigma_max, got n={n}, "
                         f"sigma_min={sigma_min}, sigma_max={sigma_max}")


def noise_levels(n=10, sigma_max=1., sigma_min=.01):
    """n levels from sigma_max down to sigma_min, a geometric sequence. [SMLD sec. 4.1]"""
    _check_levels(n, 1, sigma_max, sigma_min)
    return np.geomspace(sigma_max, sigma_min, n)


def rho_levels(n, sigma_max, sigma_min, rho=7.):
    """(smax^(1/rho) + i/(n-1) (smin^(1/rho) - smax^(1/rho)))^rho, n levels that fall and crowd
    at the small end, rho > 0. [EDM: Karras et al. 2022, eq. 5]"""
    _check_levels(n, 2, sigma_max, sigma_min)
    return np.linspace(sigma_max**(1 / rho), sigma_min**(1 / rho), n)**rho


def falling(sigmas):
    """sigmas in float64, (L,), positive and falling, or ValueError."""
    sigmas = np.asarray(sigmas, np.float64)
    if sigmas.ndim != 1 or not sigmas.size or not (sigmas > 0).all() \
            or not (np.diff(sigmas) < 0).all():
        raise ValueError("sigmas must be positive and fall from level to level")
    return sigmas


def step_sizes(sigmas, eps=2e-5):
    """alpha_i = eps sigma_i^2 / sigma_L^2, one a level. [SMLD Algorithm 1]

    The published code steps x + alpha s + sqrt(2 alpha) z, which is twice this eps.
    """
    sigmas = falling(sigmas)
    return eps * sigmas**2 / sigmas[-1]**2
