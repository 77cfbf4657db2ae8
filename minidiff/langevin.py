"""Langevin dynamics: samples from a score alone. And why it wants noise.

Climb along the score, and shake: x' = x + eps / 2 s(x) + sqrt(eps) z. Without the noise
the chain would stop on a peak of p. With just this much it wanders, and for small eps the
time that it spends in a place is p's share there. That needs no density, only its score.

It fails on data twice. Between modes that lie far apart p is nearly 0, no path crosses, and
the modes keep whatever weights the start gave them. And where p is nearly 0 no sample ever
was, so a learned score is wrong exactly where the chain starts. Noise cures both: with
sigma as wide as the data the modes are one hill, and samples are everywhere. So SMLD learns
the scores of the data at many noise levels, starts at the largest, and lowers it step by
step: annealed Langevin dynamics, `samplers.annealed_langevin`. [SMLD secs. 3 and 4]

Next: `ddpm`, which makes the lowering of the noise itself the chain.
"""

import numpy as np

from .arguments import check_domain, check_falling, check_range


def langevin_step(x, s, z, /, eps):
    """One step of Langevin dynamics: uphill by the score, and shaken. [SMLD eq. 4]

        x' = x + (eps / 2) s + sqrt(eps) z,   s = grad log p(x),  z ~ N(0, I)

    x, s, z: of one shape; eps > 0. The chain's own distribution is p but for order eps:
    on N(0, v) the variance settles at v / (1 - eps / (4 v)).

    Example:
        >>> print(langevin_step(1., -1., 2., eps=.01))
        1.195
    """
    return x + eps / 2 * s + eps**.5 * z


def noise_levels(n=10, sigma_max=1., sigma_min=.01):
    """n noise levels from sigma_max down to sigma_min, geometric, (n,). [SMLD sec. 4.1]

    The largest should join the modes, about as wide as the data; the smallest should not be
    seen. ValueError unless n >= 1 and 0 < sigma_min <= sigma_max.

    Example:
        >>> print(noise_levels(3, 1., .01))
        [1.   0.1  0.01]
    """
    low, high = check_range(n=n, sigma_min=sigma_min, sigma_max=sigma_max)
    return np.geomspace(high, low, n)


def step_sizes(sigmas, eps=2e-5):
    """A step size a level, (L,), so that every level moves as far for its width.
    [SMLD Algorithm 1]

        alpha_i = eps sigma_i^2 / sigma_L^2

    sigmas: (L,), falling; eps > 0, the smallest level's step size; else ValueError. The
    published code steps x + alpha s + sqrt(2 alpha) z, which is twice this eps.

    Example:
        >>> print(step_sizes([1., .1], eps=2e-5))
        [2.e-03 2.e-05]
    """
    sigmas = check_falling(sigmas)
    eps = check_domain(eps=eps)["eps"]
    return eps * sigmas**2 / sigmas[-1]**2
