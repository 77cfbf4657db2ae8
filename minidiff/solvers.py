"""A multistep solver, EDM's noise levels and churn, and the corrector's step size."""

import numpy as np

from .affine import order
from .arguments import check_domain, check_falling, check_range
from .predictions import posterior_mean


@order(2)
def dpmpp_2m_step(x, s, x_prev, s_prev, /, sigma_prev, sigma, sigma_next):
    """DPM-Solver++(2M) in x_0 + sigma z: alpha = 1, lambda = -ln sigma.

        x' = (sigma'/sigma) x - expm1(-h) [D + (D - D_prev) / (2 r)]
        h = lambda' - lambda,  r = (lambda - lambda_prev) / h          [DPM-Solver++ Alg. 2]

    x_prev, s_prev: the state and score at sigma_prev, one step before. sigma_next > 0; the
    step to 0 is D itself.
    """
    h = np.log(sigma / sigma_next)
    h_prev = np.log(sigma_prev / sigma)
    D = posterior_mean(x, s, 1., sigma)
    D_prev = posterior_mean(x_prev, s_prev, 1., sigma_prev)
    extrapolated = D + (D - D_prev) * (.5 * h / h_prev)
    return sigma_next / sigma * x - np.expm1(-h) * extrapolated


def rho_levels(n, sigma_max, sigma_min, rho=7.):
    """n levels that fall and crowd at the small end, (n,). [EDM: Karras et al. 2022, eq. 5]

        sigma_i = (smax^(1/rho) + i/(n-1) (smin^(1/rho) - smax^(1/rho)))^rho

    n >= 2, rho > 0. Both ends are exact.
    """
    low, high = check_range(n=n, least=2, sigma_min=sigma_min, sigma_max=sigma_max)
    rho = check_domain(rho=rho)["rho"]
    levels = np.linspace(high**(1 / rho), low**(1 / rho), n)**rho
    levels[[0, -1]] = high, low
    return levels


def churn(sigmas, s_churn=0., s_min=0., s_max=np.inf, s_noise=1.):
    """(sigma_hat, std): the levels raised, and the noise that raises them. [EDM Alg. 2]

        gamma = min(s_churn / n, sqrt(2) - 1) where s_min <= sigma <= s_max, else 0
        sigma_hat = (1 + gamma) sigma,  std = s_noise sqrt(sigma_hat^2 - sigma^2)

    sigmas: (n,), falling. ValueError unless s_churn >= 0, s_noise > 0 and s_min <= s_max.
    """
    if not (s_churn >= 0 and s_noise > 0 and s_min <= s_max):
        raise ValueError("need s_churn >= 0, s_noise > 0 and s_min <= s_max, got "
                         f"{s_churn}, {s_noise} and {s_min}, {s_max}")
    sigmas = check_falling(sigmas)
    inside = (s_min <= sigmas) & (sigmas <= s_max)
    most = min(float(s_churn) / len(sigmas), 2**.5 - 1)
    gamma = np.where(inside, most, 0.)
    sigma_hat = (1 + gamma) * sigmas
    std = float(s_noise) * sigmas * (gamma * (2 + gamma))**.5
    return sigma_hat, std


def snr_step_size(z_norm, s_norm, snr=.16, kappa=1.):
    """eps of langevin_step as a corrector. [SDE Algorithms 4 and 5]

        eps = 2 alpha,  alpha = 2 kappa (snr |z| / |s|)^2

    z_norm, s_norm: |z| and |s| of each sample, (B,). For annealed Langevin they are sigma
    and 1, as s is about -z / sigma. kappa is the SDE's.
    """
    return 2 * (2 * kappa * (snr * z_norm / s_norm)**2)
