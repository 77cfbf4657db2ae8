"""Denoising diffusion: N small Gaussian steps that destroy data, and their reversal.

Forwards nothing is learned: each step shrinks the data a little and adds a little noise,
until N(0, I) is left. Backwards, a step as small as that is Gaussian too, to first order,
and its mean asks for one thing only, the score of the noisy data at that step. So a score
at every i turns noise into data, one draw from q(x_{i-1} | x_i) after the other: ancestral
sampling. DDIM goes through the same marginals with less noise, or none, and may skip steps.

DDPM says it in eps, the noise that its network predicts; every step here is written in the
score, s = -eps / sqrt(1 - alpha_bar), so that one network, or an exact score, runs them
all. The index is i = 0 ... N-1; alpha = 1 - beta, alpha_bar = prod alpha, and
alpha_bar_prev = 1 at i = 0. [DDPM: Ho et al. 2020]

Next: `sde`, where the steps become infinitely small, and SMLD and DDPM two of a kind.
"""

import numpy as np

from .affine import order
from .arguments import check_domain, check_range, schedule
from .predictions import noise_prediction, posterior_mean


def linear_betas(n=1000, beta_min=1e-4, beta_max=.02):
    """beta_i, the variance of the noise of step i, in even steps, (n,). [DDPM sec. 4]

    ValueError unless n >= 1 and 0 < beta_min <= beta_max < 1.

    Example:
        >>> print(linear_betas(3))
        [0.0001  0.01005 0.02   ]
    """
    low, high = check_range(below=1, n=n, beta_min=beta_min, beta_max=beta_max)
    return np.linspace(low, high, n)


def cosine_betas(n=1000, beta_max=.999):
    """Betas whose alpha_bar falls like a squared cosine, (n,). [iDDPM eq. 17]

        beta_i = min(1 - F_{i+1} / F_i, beta_max)
        F_i = cos^2((i / n + .008) / 1.008 pi / 2)

    The linear ones destroy small images early. ValueError unless n >= 1, 0 < beta_max < 1.

    Example:
        >>> print(cosine_betas(4).round(3))
        [0.153 0.417 0.708 0.999]
    """
    check_domain(n=n, beta=beta_max)
    i = np.arange(n + 1)
    F = np.cos((i / n + .008) / 1.008 * np.pi / 2)**2
    return np.minimum(1 - F[1:] / F[:-1], beta_max)


def alpha_bars(betas):
    """alpha_bar_i = prod_{j <= i} (1 - beta_j): the data's share of the variance at i.
    [DDPM sec. 2]

    betas: (N,), each in (0, 1) and above 2^-53, else ValueError: 1 - beta would be 1.
    Returns (N,) in float64.

    Example:
        >>> print(alpha_bars([.5, .5]), alpha_bars(linear_betas())[-1].round(7))
        [0.5  0.25] 4.04e-05
    """
    betas = schedule(betas, "betas")
    check_domain(beta=betas)
    if (1 - betas == 1).any():
        raise ValueError("betas must be above 2^-53, else 1 - beta is 1: "
                         f"got {betas.min():g}")
    return np.cumprod(1 - betas)


def marginal(alpha_bar):
    """(a, sigma) of x_i = a x_0 + sigma z, whose squares add up to 1. [DDPM eq. 4]

    Example:
        >>> print(marginal(.36))
        (0.6, 0.8)
    """
    return alpha_bar**.5, (1 - alpha_bar)**.5


def previous(alpha_bar):
    """alpha_bar_{i-1} of each alpha_bar_i: (N,) to (N,), with alpha_bar_{-1} = 1, the data.

    Example:
        >>> print(previous([.5, .25]))
        [1.  0.5]
    """
    return np.concatenate(([1.], alpha_bar[:-1]))


def beta_between(alpha_bar, alpha_bar_prev):
    """beta = 1 - alpha_bar / alpha_bar_prev, of one step between two. [iDDPM]

    Numbers or arrays, 0 < alpha_bar < alpha_bar_prev <= 1.

    Example:
        >>> print(beta_between(.25, .5))
        0.5
    """
    return 1 - alpha_bar / alpha_bar_prev


def subset_betas(alpha_bar):
    """The betas, (N,), of the chain that has these alpha_bar.

    They may be any subset of another chain's: so a network trained on 1,000 steps samples
    in 50. ValueError unless alpha_bar, (N,), is in (0, 1) and falls as i rises.

    Example:
        >>> print(subset_betas([.5, .25]))
        [0.5 0.5]
    """
    alpha_bar = schedule(alpha_bar, "alpha_bar")
    check_domain(alpha_bar=alpha_bar)
    betas = beta_between(alpha_bar, previous(alpha_bar))
    check_domain(beta=betas)
    return betas


def forward_step(x, z, /, beta):
    """One step forwards: a draw from q(x_i | x_{i-1}). [DDPM eq. 2]

        x_i = sqrt(1 - beta) x_{i-1} + sqrt(beta) z

    x, z: of one shape; beta in (0, 1). A variance of 1 stays 1. Many steps at once are
    `sde.perturb` with a^2 = alpha_bar.

    Example:
        >>> print(forward_step(1., 2., beta=.36))
        2.0
    """
    return (1 - beta)**.5 * x + beta**.5 * z


@order(1)
def ancestral_step(x, s, z, /, beta, variance):
    """One step back: a draw from the model's p(x_{i-1} | x_i). [DDPM eq. 11, in s]

        x_{i-1} = (x_i + beta s) / sqrt(1 - beta) + sqrt(variance) z

    x, s, z: of one shape, s the score at (x_i, i). variance: beta, right where the data
    have variance 1, or `posterior_variances`, right for a single point [DDPM sec. 3.2];
    0 gives the mean, the last step of DDPM's Algorithm 2.

    Example:
        >>> print(ancestral_step(1., 0., 1., beta=.75, variance=.25))
        2.5
    """
    return (x + beta * s) / (1 - beta)**.5 + variance**.5 * z


def predicted_x0(x, s, /, alpha_bar):
    """x0_hat = (x_i + (1 - alpha_bar) s) / sqrt(alpha_bar), E[x_0 | x_i].
    [DDPM eq. 15, in s]

    It is `predictions.posterior_mean` in the words of a chain. x, s: of one shape;
    alpha_bar in (0, 1).

    Example:
        >>> print(round(predicted_x0(1., -1., alpha_bar=.25), 4))
        0.5
    """
    return posterior_mean(x, s, *marginal(alpha_bar))


def posterior_step(x, x0, z, /, alpha_bar, alpha_bar_prev, variance):
    """A draw from q(x_{i-1} | x_i, x_0): the way back, if x_0 were known.
    [DDPM eqs. 6 and 7]

        mean = beta sqrt(alpha_bar_prev) / (1 - alpha_bar) x0
               + (1 - alpha_bar_prev) sqrt(alpha) / (1 - alpha_bar) x

    x, x0, z: of one shape; 0 < alpha_bar < alpha_bar_prev <= 1. x0 may be a prediction,
    clipped to where data can be: with `predicted_x0` unclipped this is `ancestral_step`.

    Example:
        >>> print(posterior_step(2., 1., 0., alpha_bar=.5, alpha_bar_prev=1., variance=0.))
        1.0
    """
    beta = beta_between(alpha_bar, alpha_bar_prev)
    return (beta * alpha_bar_prev**.5 / (1 - alpha_bar) * x0
            + (1 - alpha_bar_prev) * (1 - beta)**.5 / (1 - alpha_bar) * x
            + variance**.5 * z)


def posterior_variance(alpha_bar, alpha_bar_prev, beta):
    """beta~ = (1 - alpha_bar_prev) / (1 - alpha_bar) beta. [DDPM eq. 7]

    It is the variance of q(x_{i-1} | x_i, x_0), smaller than beta. Numbers or arrays,
    0 <= alpha_bar < alpha_bar_prev <= 1; beta of the step between them, `beta_between`.

    Example:
        >>> print(posterior_variance(.25, .5, beta=.5))
        0.3333333333333333
    """
    return (1 - alpha_bar_prev) / (1 - alpha_bar) * beta


def posterior_variances(betas):
    """beta~_i of the chain with these betas, (N,); it is 0 at i = 0.

    Where alpha_bar is 0 in float64, after many large betas, it is beta_i.

    Example:
        >>> print(posterior_variances([.5, .5]).round(3))
        [0.    0.333]
    """
    alpha_bar = alpha_bars(betas)
    return posterior_variance(alpha_bar, previous(alpha_bar), np.asarray(betas))


@order(1)
def ddim_step(x, s, z, /, alpha_bar, alpha_bar_prev, eta):
    """From alpha_bar to alpha_bar_prev through the predicted x_0. [DDIM eqs. 12 and 16]

    Guess the clean data, then put back as much noise as belongs there: the noise that was
    there, eps, and, for eta > 0, some of it fresh.

        x' = sqrt(alpha_bar_prev) x0_hat + sqrt(1 - alpha_bar_prev - sigma^2) eps + sigma z
        sigma = eta sqrt(beta~), beta~ of `posterior_variance`

    x, s, z: of one shape; 0 < alpha_bar < alpha_bar_prev <= 1; eta in [0, 1]. At 0 the step
    adds no noise, and is a step of the probability flow; at 1 it is DDPM's posterior step.

    Example:
        >>> print(ddim_step(1., 0., 0., alpha_bar=.25, alpha_bar_prev=1., eta=0.))
        2.0
    """
    eps = noise_prediction(x, s, *marginal(alpha_bar))
    x0_hat = predicted_x0(x, s, alpha_bar)
    beta = beta_between(alpha_bar, alpha_bar_prev)
    sigma = eta * posterior_variance(alpha_bar, alpha_bar_prev, beta)**.5
    left = np.maximum(1 - alpha_bar_prev - sigma**2, 0.)  # rounding alone makes it negative
    return (alpha_bar_prev**.5 * x0_hat
            + left**.5 * eps
            + sigma * z)
