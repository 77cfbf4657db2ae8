"""Denoising diffusion: N small Gaussian steps that destroy data, and their reversal.

The index is i = 0 ... N-1; alpha = 1 - beta, alpha_bar = prod alpha, and alpha_bar_prev = 1
at i = 0. Every step is written in the score s; a network that predicts eps gives
s = -eps / sqrt(1 - alpha_bar). [DDPM: Ho et al. 2020]
"""

import numpy as np

from .affine import order
from .arguments import check_domain, check_range, schedule
from .predictions import noise_prediction, posterior_mean


def linear_betas(n=1000, beta_min=1e-4, beta_max=.02):
    """beta_i in even steps from beta_min to beta_max, (n,). [DDPM sec. 4]"""
    low, high = check_range(below=1, n=n, beta_min=beta_min, beta_max=beta_max)
    return np.linspace(low, high, n)


def cosine_betas(n=1000, beta_max=.999):
    """beta_i = min(1 - F_{i+1} / F_i, beta_max), (n,). [iDDPM eq. 17]

        F_i = cos^2((i / n + .008) / 1.008 pi / 2)
    """
    check_domain(n=n, beta=beta_max)
    i = np.arange(n + 1)
    F = np.cos((i / n + .008) / 1.008 * np.pi / 2)**2
    return np.minimum(1 - F[1:] / F[:-1], beta_max)


def alpha_bars(betas):
    """alpha_bar_i = prod_{j <= i} (1 - beta_j), (N,) in float64. [DDPM sec. 2]"""
    betas = schedule(betas, "betas")
    check_domain(beta=betas)
    return np.cumprod(1 - betas)


def previous(alpha_bar):
    """alpha_bar_{i-1} of each alpha_bar_i, (N,), with alpha_bar_{-1} = 1."""
    return np.concatenate(([1.], alpha_bar[:-1]))


def beta_between(alpha_bar, alpha_bar_prev):
    """beta = 1 - alpha_bar / alpha_bar_prev, of the step between them. [iDDPM eq. 19]"""
    return 1 - alpha_bar / alpha_bar_prev


def subset_betas(alpha_bar):
    """The betas, (N,), of the chain that has these alpha_bar.

    They may be any subset of another chain's; alpha_bar falls as i rises.
    """
    alpha_bar = schedule(alpha_bar, "alpha_bar")
    betas = beta_between(alpha_bar, previous(alpha_bar))
    check_domain(alpha_bar=alpha_bar, beta=betas)
    return betas


def forward_step(x, z, /, beta):
    """x_i = sqrt(1 - beta) x_{i-1} + sqrt(beta) z. [DDPM eq. 2]"""
    return (1 - beta)**.5 * x + beta**.5 * z


@order(1)
def ancestral_step(x, s, z, /, beta, variance):
    """x_{i-1} = (x_i + beta s) / sqrt(1 - beta) + sqrt(variance) z. [DDPM eq. 11, in s]

    variance: beta or `posterior_variances`, the two choices of sec. 3.2; 0 gives the mean.
    """
    return (x + beta * s) / (1 - beta)**.5 + variance**.5 * z


def predicted_x0(x, s, /, alpha_bar):
    """x0_hat = (x_i + (1 - alpha_bar) s) / sqrt(alpha_bar). [DDPM eq. 15, in s]"""
    return posterior_mean(x, s, alpha_bar**.5, (1 - alpha_bar)**.5)


def posterior_step(x, x0, z, /, alpha_bar, alpha_bar_prev, variance):
    """A draw from q(x_{i-1} | x_i, x_0). [DDPM eqs. 6 and 7]

        mean = beta sqrt(alpha_bar_prev) / (1 - alpha_bar) x0
               + (1 - alpha_bar_prev) sqrt(alpha) / (1 - alpha_bar) x

    x0 may be a prediction, clipped.
    """
    beta = beta_between(alpha_bar, alpha_bar_prev)
    return (beta * alpha_bar_prev**.5 / (1 - alpha_bar) * x0
            + (1 - alpha_bar_prev) * (1 - beta)**.5 / (1 - alpha_bar) * x
            + variance**.5 * z)


def posterior_variance(alpha_bar, alpha_bar_prev):
    """beta~ = (1 - alpha_bar_prev) / (1 - alpha_bar) beta. [DDPM eq. 7]

    It is the variance of q(x_{i-1} | x_i, x_0).
    """
    beta = beta_between(alpha_bar, alpha_bar_prev)
    return (1 - alpha_bar_prev) / (1 - alpha_bar) * beta


def posterior_variances(betas):
    """beta~_i of the chain with these betas, (N,); it is 0 at i = 0."""
    alpha_bar = alpha_bars(betas)
    return posterior_variance(alpha_bar, previous(alpha_bar))


@order(1)
def ddim_step(x, s, z, /, alpha_bar, alpha_bar_prev, eta):
    """From alpha_bar to alpha_bar_prev through the predicted x_0. [DDIM eqs. 12 and 16]

        x' = sqrt(alpha_bar_prev) x0_hat + sqrt(1 - alpha_bar_prev - sigma^2) eps + sigma z
        sigma = eta sqrt(beta~), beta~ of `posterior_variance`

    eta in [0, 1]. At 0 the step adds no noise, at 1 it is DDPM's posterior step.
    """
    eps = noise_prediction(x, s, alpha_bar**.5, (1 - alpha_bar)**.5)
    x0_hat = predicted_x0(x, s, alpha_bar)
    sigma = eta * posterior_variance(alpha_bar, alpha_bar_prev)**.5
    return (alpha_bar_prev**.5 * x0_hat
            + (1 - alpha_bar_prev - sigma**2)**.5 * eps
            + sigma * z)
