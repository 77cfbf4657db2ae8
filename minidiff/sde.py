"""Diffusions in continuous time, dx = f(x, t) dt + g(t) dw on [0, T], and their reversal.

An SDE has drift(x, t) = f, diffusion(t) = g, marginal(t) = (a, sigma) of x_t = a x_0 + sigma z,
time(ratio), the t where sigma / a is a ratio, kappa(t, dt) of the corrector, and a chain of n > 1
steps, x_i = x_{i-1} + f_i + G_i z, discretize(x, i, n) = (f_i, G_i). Times are host floats or NumPy
arrays; a step of size dt > 0 goes from t - dt to t forwards, from t to t - dt in reverse. Operands
have one shape, s is the score at (x, t), z ~ N(0, I).
[SDE: Song et al. 2021, "Score-based generative modeling through SDEs"]
"""

from dataclasses import dataclass

import numpy as np

from . import ddpm
from .affine import order
from .arguments import check_domain, check_range


class _SDE:
    """Unless said otherwise drift is 0, kappa 1, the chain Euler-Maruyama's."""

    T = 1.

    def drift(self, x, t):
        return 0. * x

    def discretize(self, x, i, n):
        t, dt = self.T * np.asarray(i) / (n - 1), self.T / n
        return self.drift(x, t) * dt, forward_sde_step(0., 1., self, t, dt)

    def kappa(self, t, dt):
        return 1. + 0. * t


@dataclass(frozen=True)
class VE(_SDE):
    """Variance exploding, SMLD's limit: g = sigma(t) sqrt(2 ln(smax / smin)), a = 1,
    sigma(t) = smin (smax / smin)^t, also at 0, where the paper has 0. [SDE eqs. 29 and 30]

    Its chain: sigma_i = sigma(i / (n - 1)), sigma_{-1} = 0, G_i^2 = sigma_i^2 - sigma_{i-1}^2,
    whose sum is smax^2. [SDE eq. 8]
    """

    sigma_min: float = .01
    sigma_max: float = 50.

    def __post_init__(self):
        low, high = check_range(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        object.__setattr__(self, "sigma_min", low)
        object.__setattr__(self, "sigma_max", high)

    def diffusion(self, t):
        return self.marginal(t)[1] * (2 * np.log(self.sigma_max / self.sigma_min))**.5

    def marginal(self, t):
        t = np.asarray(t, np.float64)
        return 1. + 0. * t, self.sigma_min * (self.sigma_max / self.sigma_min)**t

    def time(self, ratio):
        ratio = np.asarray(ratio, np.float64)
        return np.log(ratio / self.sigma_min) / np.log(self.sigma_max / self.sigma_min)

    def level(self, i, n):
        """sigma_i"""
        return np.where(np.asarray(i) < 0, 0., self.marginal(np.asarray(i) / (n - 1))[1])

    def discretize(self, x, i, n):
        return 0. * x, (self.level(i, n)**2 - self.level(i - 1, n)**2)**.5

    def ancestral(self, x, s, z, i, n):
        """x + G^2 s + G sigma_{i-1} / sigma_i z. [SDE eq. 47]"""
        _, G = self.discretize(x, i, n)
        return x + G**2 * s + G * self.level(i - 1, n) / self.level(i, n) * z


@dataclass(frozen=True)
class EDM(_SDE):
    """VE whose time is the noise level: sigma(t) = t, g = sqrt(2 t), T = sigma_max. [EDM sec. 3]"""

    sigma_max: float = 80.
    T = property(lambda self: self.sigma_max)

    def __post_init__(self):
        object.__setattr__(self, "sigma_max", check_domain(sigma_max=self.sigma_max)["sigma_max"])

    def diffusion(self, t):
        return (2 * np.asarray(t, np.float64))**.5

    def marginal(self, t):
        return 1., np.asarray(t, np.float64)[()]

    def time(self, ratio):
        return np.asarray(ratio, np.float64)[()]


@dataclass(frozen=True)
class _LinearBeta(_SDE):
    """VP and sub-VP: beta(t) = bmin + t (bmax - bmin), f = -beta x / 2, a = exp(-1/2 int beta)."""

    beta_min: float = .1
    beta_max: float = 20.

    def __post_init__(self):
        low, high = check_range(beta_min=self.beta_min, beta_max=self.beta_max)
        object.__setattr__(self, "beta_min", low)
        object.__setattr__(self, "beta_max", high)

    def beta(self, t):
        return self.beta_min + np.asarray(t, np.float64) * (self.beta_max - self.beta_min)

    def log_a(self, t):
        """-1/2 int_0^t beta"""
        t = np.asarray(t, np.float64)
        return -t**2 * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def drift(self, x, t):
        return -.5 * self.beta(t) * x

    def time(self, ratio):
        slope, integral = self.beta_max - self.beta_min, self.integral_at(ratio)
        return 2 * integral / (self.beta_min + (self.beta_min**2 + 2 * slope * integral)**.5)


class VP(_LinearBeta):
    """Variance preserving, DDPM's limit: g = sqrt(beta(t)), sigma = sqrt(1 - a^2), by expm1 so
    that small t keeps its digits. [SDE eqs. 29 and 32] Its chain is DDPM, f_i = sqrt(1 - beta_i) x
    - x, G_i = sqrt(beta_i), beta_i = beta(i / (n - 1)) / n; kappa of the corrector is 1 - beta dt.
    """

    def diffusion(self, t):
        return self.beta(t)**.5

    def marginal(self, t):
        return np.exp(self.log_a(t)), (-np.expm1(2 * self.log_a(t)))**.5

    def integral_at(self, ratio):
        """int beta where sqrt(1 - a^2) / a = ratio"""
        return np.log1p(np.asarray(ratio, np.float64)**2)

    def kappa(self, t, dt):
        return 1 - self.beta(t) * dt

    def discretize(self, x, i, n):
        beta = self.beta(np.asarray(i) / (n - 1)) / n
        return ddpm.forward_step(x, 0., beta) - x, ddpm.forward_step(0., 1., beta)

    def ancestral(self, x, s, z, i, n):
        """`ddpm.ancestral_step` with variance beta_i. [SDE eq. 4]"""
        _, G = self.discretize(x, i, n)
        return ddpm.ancestral_step(x, s, z, G**2, G**2)


class SubVP(_LinearBeta):
    """Sub-VP: VP's drift, g = sqrt(beta (1 - a^4)), sigma = 1 - a^2, less than VP's. [SDE eqs. 12
    and 29, whose variance is its square] It has no betas: its chain is Euler-Maruyama."""

    def diffusion(self, t):
        return (self.beta(t) * -np.expm1(4 * self.log_a(t)))**.5

    def marginal(self, t):
        return np.exp(self.log_a(t)), -np.expm1(2 * self.log_a(t))

    def integral_at(self, ratio):
        """int beta where (1 - a^2) / a = ratio"""
        return 2 * np.arcsinh(np.asarray(ratio, np.float64) / 2)


def prior_std(sde):
    """The prior is N(0, std^2 I): std = sigma_max for VE, 1 for VP and sub-VP."""
    return getattr(sde, "sigma_max", 1.)


def importance_times(sde, u, t_min=1e-5):
    """(t, Z): t of density g^2 / (Z sigma^2) on [t_min, T] from u ~ U(0, 1], so that the mean of
    Z sigma^2 |..|^2 is the integral of g^2 |..|^2. As g^2 / sigma^2 = 2 d/dt ln(sigma / a), just
    ln(sigma / a) is uniform. [ScoreFlow: Song et al. 2021]"""
    p = check_domain(u=u, t_min=t_min, sde=sde, t=t_min)
    u, t_min = p["u"], p["t_min"]
    low, high = (np.log(sigma / a) for a, sigma in map(sde.marginal, (t_min, sde.T)))
    return sde.time(np.exp(low + (high - low) * u)), 2 * (high - low)


def perturb(x0, z, /, a, sigma):
    """x_t = a x_0 + sigma z: a sample of the marginal at once; DDPM's x_i where a^2 = alpha_bar,
    sigma^2 = 1 - alpha_bar. [SDE eq. 29, DDPM eq. 4]"""
    return a * x0 + sigma * z


def forward_sde_step(x, z, /, sde, t, dt):
    """x' = x + f(x, t) dt + g(t) sqrt(dt) z: Euler-Maruyama, forwards. [SDE eq. 5]"""
    return x + sde.drift(x, t) * dt + sde.diffusion(t) * dt**.5 * z


@order(1)
def reverse_sde_step(x, s, z, /, sde, t, dt):
    """x' = x - [f(x, t) - g^2 s] dt + g sqrt(dt) z: Euler-Maruyama on the reverse-time SDE, of
    weak order 1. [SDE eq. 6; Anderson 1982]"""
    g = sde.diffusion(t)
    return x - (sde.drift(x, t) - g**2 * s) * dt + g * dt**.5 * z


@order(1)
def reverse_diffusion_step(x, s, z, /, sde, i, n):
    """x_{i-1} = x_i - f_i(x_i) + G_i^2 s + G_i z: the SDE's own chain, reversed, i = n-1 ... 0.
    [SDE eq. 46]"""
    f, G = sde.discretize(x, i, n)
    return x - f + G**2 * s + G * z


@order(1)
def ancestral_step(x, s, z, /, sde, i, n):
    """x_{i-1} of x_i by the ancestral sampling of VE's or VP's chain. [SDE eqs. 4 and 47]"""
    return sde.ancestral(x, s, z, i, n)


def flow(x, s, sde, t):
    """f~ = f(x, t) - 1/2 g^2 s, the velocity of the probability-flow ODE. [SDE eq. 13] As it is
    linear in both, its divergence is flow(D, tr grad s, sde, t), D the dimension."""
    return sde.drift(x, t) - .5 * sde.diffusion(t)**2 * s


@order(1)
def pf_ode_step(x, s, /, sde, t, dt):
    """x' = x - f~ dt: Euler on the probability-flow ODE."""
    return x - flow(x, s, sde, t) * dt


@order(2)
def heun_step(x, s, s_next, /, sde, t, dt):
    """x' = (x + x'') / 2, x'' two Euler steps on: Heun, the mean of both slopes. s_next is the
    score at (pf_ode_step(x, s), t - dt), t > dt. [EDM Alg. 1]"""
    euler = pf_ode_step(x, s, sde, t, dt)
    return .5 * (x + pf_ode_step(euler, s_next, sde, t - dt, dt))
