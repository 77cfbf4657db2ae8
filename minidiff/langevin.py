"""Langevin dynamics: samples from a score alone. And why the data want noise.

Climb along the score, and shake: x' = x + eps / 2 s(x) + sqrt(eps) z. Without the noise
the chain would stop on a peak of p. With noise of exactly this size it keeps moving. With
small eps, and long enough, the share of its time that it spends in a region is p's
probability of that region. That needs no density, only its score.

On real data it fails, for two reasons. Long enough may be for ever: between modes that lie
far apart p is nearly 0, no path crosses, and the modes keep whatever weights the start gave
them. And there are no training samples where p is nearly 0, so a learned score is wrong
exactly where the chain starts. Noise added to the data cures both: with sigma as wide as
the data the modes are one hill, and samples are everywhere. So SMLD (score matching with
Langevin dynamics) learns the scores of the data at many noise levels, runs the chain on the
noisiest data first, and then on less and less noisy ones: annealed Langevin dynamics,
`samplers.annealed_langevin`. [SMLD secs. 3 and 4]

Next: `ddpm`, where each step of the chain lowers the noise.
"""

import numpy as np

from .arguments import check_domain, check_falling, check_range


def langevin_step(x, s, z, /, eps):
    """One step of Langevin dynamics: uphill by the score, and shaken. [SMLD eq. 4]

        x' = x + (eps / 2) s + sqrt(eps) z,   s = grad log p(x),  z ~ N(0, I)

    x, s, z: of one shape; eps > 0. A small eps takes many steps to get anywhere, a large
    one misses p by an error of order eps: on N(0, v) the variance settles at
    v / (1 - eps / (4 v)), and from eps = 4 v on the chain diverges.

    Example:
        >>> print(langevin_step(1., -1., 2., eps=.01))
        1.195
    """
    return x + eps / 2 * s + eps**.5 * z


def noise_levels(n=10, sigma_max=1., sigma_min=.01):
    """n noise levels from sigma_max down to sigma_min, geometric, (n,). [SMLD sec. 4.1]

    The largest should be as wide as the data, so that the modes merge; the smallest too
    small to matter. ValueError unless n >= 1 and 0 < sigma_min <= sigma_max.

    Example:
        >>> print(noise_levels(3, 1., .01))
        [1.   0.1  0.01]
    """
    low, high = check_range(n=n, sigma_min=sigma_min, sigma_max=sigma_max)
    return np.geomspace(high, low, n)


def step_sizes(sigmas, eps=2e-5):
    """A step size a level, (L,), so that a step is the same share of sigma at each.
    [SMLD Algorithm 1]

        alpha_i = eps sigma_i^2 / sigma_L^2

    sigmas: (L,), falling; eps > 0, the smallest level's step size; else ValueError. The
    published code steps x + alpha s + sqrt(2 alpha) z: for its steps give twice its eps.

    Example:
        >>> print(step_sizes([1., .1], eps=2e-5))
        [2.e-03 2.e-05]
    """
    sigmas = check_falling(sigmas)
    eps = check_domain(eps=eps)["eps"]
    return eps * sigmas**2 / sigmas[-1]**2
