"""Fewer and better steps: a multistep solver, EDM's levels and churn, the SNR rule.

The probability flow is an ODE, so that what is known of ODEs applies. A step of Euler's
errs by the square of its length; Heun's, `sde.heun_step`, looks at the slope at both ends;
DPM-Solver++(2M) remembers the last denoised state instead, and needs one score a step.
Where to put the levels matters as much: EDM crowds them at small noise, where the flow
bends.

Noise on the way corrects old errors. EDM's churn adds some before a step of the flow; a
corrector adds Langevin steps between a sampler's own, `samplers.predictor_corrector`. Their
length follows from norms: the drift is to be snr times as long as the noise.

Next: `samplers`, the loops that run all this; `likelihood`, what else a flow can tell.
"""

import numpy as np

from .affine import order
from .arguments import check_domain, check_falling, check_range, schedule
from .predictions import posterior_mean


@order(2)
def dpmpp_2m_step(x, s, x_prev, s_prev, /, sigma_prev, sigma, sigma_next):
    """DPM-Solver++(2M) in x_0 + sigma z: alpha = 1, lambda = -ln sigma.

        x' = (sigma'/sigma) x - expm1(-h) [D + (D - D_prev) / (2 r)]
        h = lambda' - lambda,  r = (lambda - lambda_prev) / h          [DPM-Solver++ Alg. 2]

    The flow in lambda is linear but for D, which is extrapolated from two values: of second
    order, with one score a step. x_prev, s_prev: the state and score at sigma_prev, one
    step before. sigma_prev > sigma > sigma_next > 0; the step to 0 is D itself.

    Example:
        >>> levels = {"sigma_prev": 4., "sigma": 2., "sigma_next": 1.}
        >>> print(dpmpp_2m_step(2., -.5, 4., -.25, **levels))  # D = 0 at both: x scales
        1.0
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

    rho = 1 is even; the larger rho, the more levels are small. Both ends are exact.
    ValueError unless n >= 2, rho > 0 and 0 < sigma_min <= sigma_max.

    Example:
        >>> print(rho_levels(4, 8., .5).round(2))
        [8.   3.57 1.43 0.5 ]
    """
    low, high = check_range(n=n, least=2, sigma_min=sigma_min, sigma_max=sigma_max)
    rho = check_domain(rho=rho)["rho"]
    share = np.arange(1, n - 1) / (n - 1)
    # the formula over smax: its powers would overflow for a small rho, and be 1 for a large
    falls = np.expm1((np.log(low) - np.log(high)) / rho)
    between = np.exp(np.log(high) + rho * np.log1p(share * falls))
    return np.array([high, *between, low])


def churn(sigmas, s_churn=0., s_min=0., s_max=np.inf, s_noise=1.):
    """(sigma_hat, std): the levels raised, and the noise that raises them. [EDM Alg. 2]

        gamma = min(s_churn / n, sqrt(2) - 1) where s_min <= sigma <= s_max, else 0
        sigma_hat = (1 + gamma) sigma,  std = s_noise sqrt(sigma_hat^2 - sigma^2)

    A step of the flow then starts from sigma_hat, and what noise was wrong is partly
    replaced. s_churn = 0 changes nothing. sigmas: (n,), falling. ValueError unless
    s_churn >= 0, s_noise > 0 and s_min <= s_max.

    Example:
        >>> sigma_hat, std = churn([2., 1.], s_churn=.5)  # gamma = .25
        >>> print(sigma_hat, std)
        [2.5  1.25] [1.5  0.75]
    """
    check_domain(s_churn=s_churn, s_noise=s_noise)
    if not s_min <= s_max:
        raise ValueError(f"need s_min <= s_max, got {s_min} and {s_max}")
    sigmas = check_falling(sigmas)
    inside = (s_min <= sigmas) & (sigmas <= s_max)
    most = min(float(s_churn) / len(sigmas), 2**.5 - 1)
    gamma = np.where(inside, most, 0.)
    sigma_hat = (1 + gamma) * sigmas
    std = float(s_noise) * sigmas * (gamma * (2 + gamma))**.5
    return schedule(sigma_hat, "sigma_hat"), schedule(std, "std")


def snr_step_size(z_norm, s_norm, snr=.16, kappa=1.):
    """eps of langevin_step as a corrector: a drift snr times as long as the noise.
    [SDE Algorithms 4 and 5]

        eps = 2 alpha,  alpha = 2 kappa (snr |z| / |s|)^2

    A step moves by eps |s| / 2 along the score and by sqrt(eps) |z| at random. The rule
    makes the first snr sqrt(kappa) times the second. With a longer step the drift outgrows
    the noise, and the chain overshoots: it settles too wide, or explodes. With a shorter
    one it hardly moves.

    z_norm, s_norm: |z| and |s| of each sample, (B,). For annealed Langevin they are sigma
    and 1, as s is about -z / sigma. kappa > 0 is the SDE's. eps then depends on z, which
    the step also multiplies: that biases, see `samplers.predictor_corrector`. Nothing is
    checked here: a score of 0 gives inf, for which an engine's corrector leaves x as it is.

    Example:
        >>> print(snr_step_size(2., 4., snr=.5))
        0.25
    """
    return 2 * (2 * kappa * (snr * z_norm / s_norm)**2)
