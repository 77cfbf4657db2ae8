"""Diffusions in continuous time, dx = f(x, t) dt + g(t) dw on [0, T], and their reversal.

An SDE gives its drift f, diffusion g, marginal x_t = a x_0 + sigma z, prior and, where the
paper has one, its discretisation. Times are host floats or NumPy arrays; a step of size
dt > 0 goes from t - dt to t forwards, from t to t - dt in reverse.
[SDE: Song et al. 2021, "Score-based generative modeling through SDEs"]
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class VE:
    """Variance exploding, SMLD's limit: f = 0, g = sigma(t) sqrt(2 ln(smax/smin)),
    sigma(t) = smin (smax/smin)^t. [SDE eq. 30]"""

    sigma_min: float = .01
    sigma_max: float = 50.
    T = 1.

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max < np.inf:
            raise ValueError("need 0 < sigma_min < sigma_max, got "
                             f"{self.sigma_min} and {self.sigma_max}")

    def drift(self, x, t):
        """f(x, t) = 0."""
        return 0. * x

    def diffusion(self, t):
        """g(t) = sigma(t) sqrt(2 ln(sigma_max / sigma_min))."""
        return self.marginal(t)[1] * (2 * np.log(self.sigma_max / self.sigma_min))**.5

    def marginal(self, t):
        """(a, sigma) of x_t = a x_0 + sigma z: a = 1. [SDE eq. 29, its sigma(0) as 0]"""
        t = np.asarray(t, np.float64)
        return 1. + 0. * t, self.sigma_min * (self.sigma_max / self.sigma_min)**t

    def time(self, ratio):
        """The t at which sigma / a = ratio."""
        return np.log(ratio / self.sigma_min) / np.log(self.sigma_max / self.sigma_min)

    def discretize(self, x, i, n):
        """(f_i, G_i) of n steps: f = 0, G = sqrt(sigma_i^2 - sigma_{i-1}^2), sigma_{-1} = 0,
        sigma_i = sigma(i / (n - 1)); sum G_i^2 = sigma_max^2. [SDE eq. 8, n > 1]"""
        i = np.asarray(i)
        before = np.where(i > 0, self.marginal((i - 1) / (n - 1))[1], 0.)
        return 0. * x, (self.marginal(i / (n - 1))[1]**2 - before**2)**.5


@dataclass(frozen=True)
class _LinearBeta:
    """What VP and sub-VP share: beta(t) linear, f = -beta x / 2, a = exp(-1/2 int beta)."""

    beta_min: float = .1
    beta_max: float = 20.
    T = 1.

    def __post_init__(self):
        if not 0 < self.beta_min <= self.beta_max < np.inf:
            raise ValueError("need 0 < beta_min <= beta_max, got "
                             f"{self.beta_min} and {self.beta_max}")

    def beta(self, t):
        """beta(t) = beta_min + t (beta_max - beta_min)."""
        return self.beta_min + np.asarray(t, np.float64) * (self.beta_max - self.beta_min)

    def log_a(self, t):
        """ln a(t) = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2."""
        t = np.asarray(t, np.float64)
        return -t**2 * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def drift(self, x, t):
        """f(x, t) = -1/2 beta(t) x."""
        return -.5 * self.beta(t) * x

    def time(self, ratio):
        """The t at which sigma / a = ratio, from int_0^t beta = -2 ln a(ratio)."""
        slope = self.beta_max - self.beta_min
        integral = -2 * self.log_a_at(np.asarray(ratio, np.float64))
        return 2 * integral / (self.beta_min + (self.beta_min**2 + 2 * slope * integral)**.5)


class VP(_LinearBeta):
    """Variance preserving, DDPM's limit: g = sqrt(beta(t)). [SDE eq. 32]"""

    def diffusion(self, t):
        """g(t) = sqrt(beta(t))."""
        return self.beta(t)**.5

    def marginal(self, t):
        """(a, sigma), sigma = sqrt(1 - a^2), by expm1 so that small t keeps its digits."""
        return np.exp(self.log_a(t)), (-np.expm1(2 * self.log_a(t)))**.5

    def log_a_at(self, ratio):
        """ln a where sqrt(1 - a^2) / a = ratio."""
        return -.5 * np.log1p(ratio**2)

    def discretize(self, x, i, n):
        """(f_i, G_i) of n steps: f = sqrt(1 - beta_i) x - x, G = sqrt(beta_i), with
        beta_i = beta(i / (n - 1)) / n: DDPM's own. [SDE eqs. 10 and 46, n > 1]"""
        beta = self.beta(np.asarray(i) / (n - 1)) / n
        return (1 - beta)**.5 * x - x, beta**.5


class SubVP(_LinearBeta):
    """Sub-VP: VP's drift, g = sqrt(beta (1 - a^4)), so a smaller variance. [SDE eq. 12]"""

    def diffusion(self, t):
        """g(t) = sqrt(beta(t) (1 - a^4))."""
        return (self.beta(t) * -np.expm1(4 * self.log_a(t)))**.5

    def marginal(self, t):
        """(a, sigma), sigma = 1 - a^2. [SDE eq. 29: the variance is its square]"""
        return np.exp(self.log_a(t)), -np.expm1(2 * self.log_a(t))

    def log_a_at(self, ratio):
        """ln a where (1 - a^2) / a = ratio."""
        return -np.arcsinh(ratio / 2)

    def discretize(self, x, i, n):
        """(f_i, G_i) of n steps by Euler-Maruyama, dt = 1 / n: sub-VP has no betas."""
        t = np.asarray(i) / (n - 1)
        return self.drift(x, t) / n, self.diffusion(t) / n**.5


def prior_std(sde):
    """The prior is N(0, std^2 I): std = sigma_max for VE, 1 for VP and sub-VP."""
    return getattr(sde, "sigma_max", 1.)


def perturb(x0, z, /, a, sigma):
    """x_t = a x_0 + sigma z: a sample of the marginal at once. [SDE eq. 29]

    x0, z: same shape, z ~ N(0, I); a, sigma > 0 from `marginal`.
    """
    return a * x0 + sigma * z


def forward_sde_step(x, z, /, sde, t, dt):
    """x' = x + f(x, t) dt + g(t) sqrt(dt) z: Euler-Maruyama, forwards. [SDE eq. 5]"""
    return x + sde.drift(x, t) * dt + sde.diffusion(t) * dt**.5 * z


def reverse_sde_step(x, s, z, /, sde, t, dt):
    """x' = x - [f(x, t) - g^2 s] dt + g sqrt(dt) z: Euler-Maruyama on the reverse-time SDE.
    [SDE eq. 6; Anderson 1982]

    x, s, z: same shape, s the score at (x, t); 0 <= t <= T, dt > 0.
    """
    g = sde.diffusion(t)
    return x - (sde.drift(x, t) - g**2 * s) * dt + g * dt**.5 * z


def reverse_diffusion_step(x, s, z, /, sde, i, n):
    """x_{i-1} = x_i - f_i(x_i) + G_i^2 s + G_i z: the SDE's own discretisation, reversed.
    [SDE eq. 46]

    x, s, z: same shape; index i of n steps, i = n-1 ... 0.
    """
    f, G = sde.discretize(x, i, n)
    return x - f + G**2 * s + G * z


def pf_ode_step(x, s, /, sde, t, dt):
    """x' = x - [f(x, t) - 1/2 g^2 s] dt: Euler on the probability-flow ODE. [SDE eq. 13]"""
    return x - (sde.drift(x, t) - .5 * sde.diffusion(t)**2 * s) * dt


def rescaled_score(score, a, sigma):
    """The score of a x_0 + sigma z from a VE score s(x, sigma): s(x / a, sigma / a) / a.

    Change of variables. score(x, sigma) takes the noise level of x_0 + sigma z.
    Returns a function of x.
    """
    a, sigma = float(a), float(sigma)  # so that a float32 x stays one
    return lambda x: score(x / a, sigma / a) / a
