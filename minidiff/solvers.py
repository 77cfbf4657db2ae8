"""Second-order solvers of the probability-flow ODE, and the corrector's step size.

In EDM's variable x = x_0 + sigma z the flow is dx = -sigma s(x, sigma) dsigma, and the denoiser is
D = x + sigma^2 s. Levels fall; the last step, to sigma = 0, is D itself.
"""

import numpy as np

from .score_matching import posterior_mean


def heun_step(x, s, s_next, /, sigma, sigma_next):
    """x' = x + (sigma' - sigma) (d + d') / 2,  d = -sigma s, d' = -sigma' s'. [EDM Alg. 1]

    s at (x, sigma), s_next at the Euler step (x + (sigma' - sigma) d, sigma'); second order.
    """
    return x + (sigma_next - sigma) * .5 * (-sigma * s - sigma_next * s_next)


def dpmpp_2m_step(x, s, x_prev, s_prev, /, sigma_prev, sigma, sigma_next):
    """DPM-Solver++(2M) in x_0 + sigma z: alpha = 1, lambda = -ln sigma, second order.

        x' = (sigma'/sigma) x - expm1(-h) [D + (D - D_prev) / (2 r)]
        h = lambda' - lambda,  r = (lambda - lambda_prev) / h          [DPM-Solver++ Alg. 2]

    x, s at sigma; x_prev, s_prev at sigma_prev, one step before. sigma_next > 0.
    """
    h, h_prev = np.log(sigma / sigma_next), np.log(sigma_prev / sigma)
    D, D_prev = posterior_mean(x, s, 1., sigma), posterior_mean(x_prev, s_prev, 1., sigma_prev)
    return sigma_next / sigma * x - np.expm1(-h) * (D + (D - D_prev) * (.5 * h / h_prev))


def snr_step_size(z_norm, s_norm, snr=.16, kappa=1.):
    """eps of langevin_step for the corrector: eps = 2 alpha, alpha = 2 kappa (snr |z| / |s|)^2.

    z_norm, s_norm: each sample's |z| and |s|, (B,); kappa is 1 - beta_i for VP, else 1.
    [SDE Algorithms 4 and 5]
    """
    return 2 * (2 * kappa * (snr * z_norm / s_norm)**2)
