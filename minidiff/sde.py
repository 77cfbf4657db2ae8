"""Diffusions in continuous time, dx = f(x, t) dt + g(t) dw on [0, T], and their reversal.

What an SDE has:

    drift(x, t)            f
    diffusion(t)           g
    marginal(t)            (a, sigma) of x_t = a x_0 + sigma z
    time(ratio)            the t at which sigma / a is that ratio
    prior_std              the std of N(0, std^2 I), where the reverse process starts
    kappa(t, dt)           the corrector's factor
    discretize(x, i, n)    (f_i, G_i) of its own chain of n > 1 steps,
                           x_i = x_{i-1} + f_i + G_i z

Times are host floats or NumPy arrays. A step of size dt > 0 goes from t - dt to t forwards,
and from t to t - dt in reverse. Operands have one shape; s is the score at (x, t) and
z ~ N(0, I). [SDE: Song et al. 2021, "Score-based generative modeling through SDEs"]
"""

from dataclasses import dataclass

import numpy as np

from . import ddpm
from .affine import order
from .arguments import check_domain, check_range


class _SDE:
    """What holds where a process does not say: drift 0, kappa 1, Euler-Maruyama's chain."""

    T = 1.
    prior_std = 1.

    def drift(self, x, t):
        """f(x, t) = 0."""
        return 0. * x

    def discretize(self, x, i, n):
        """(f_i, G_i) of Euler-Maruyama's step at t = i T / (n - 1), with dt = T / n."""
        t = self.T * np.asarray(i) / (n - 1)
        dt = self.T / n
        G = forward_sde_step(0., 1., self, t, dt)
        return self.drift(x, t) * dt, G

    def kappa(self, t, dt):
        """1, at every time."""
        return 1. + 0. * t


@dataclass(frozen=True)
class VE(_SDE):
    """Variance exploding, SMLD's limit. [SDE eqs. 29 and 30]

        sigma(t) = smin (smax / smin)^t,  a = 1,  g = sigma(t) sqrt(2 ln(smax / smin))

    At t = 0 sigma is smin, where the paper has 0. Its chain [SDE eq. 8] has
    sigma_i = sigma(i / (n - 1)), sigma_{-1} = 0 and G_i^2 = sigma_i^2 - sigma_{i-1}^2,
    whose sum is smax^2.
    """

    sigma_min: float = .01
    sigma_max: float = 50.

    def __post_init__(self):
        low, high = check_range(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        self.__dict__.update(sigma_min=low, sigma_max=high)  # frozen: takes no assignment

    @property
    def prior_std(self):
        """sigma_max, beside which the spread of the data is small."""
        return self.sigma_max

    def diffusion(self, t):
        """g = sigma(t) sqrt(2 ln(smax / smin))."""
        _, sigma = self.marginal(t)
        return sigma * (2 * np.log(self.sigma_max / self.sigma_min))**.5

    def marginal(self, t):
        """(1, sigma(t))."""
        t = np.asarray(t, np.float64)
        return 1. + 0. * t, self.sigma_min * (self.sigma_max / self.sigma_min)**t

    def time(self, ratio):
        """The t at which sigma(t) is the ratio."""
        ratio = np.asarray(ratio, np.float64)
        return np.log(ratio / self.sigma_min) / np.log(self.sigma_max / self.sigma_min)

    def level(self, i, n):
        """sigma_i of the chain, 0 at i = -1."""
        _, sigma = self.marginal(np.asarray(i) / (n - 1))
        return np.where(np.asarray(i) < 0, 0., sigma)

    def discretize(self, x, i, n):
        """(0, G_i), G_i^2 = sigma_i^2 - sigma_{i-1}^2. [SDE eq. 8]"""
        variance = self.level(i, n)**2 - self.level(i - 1, n)**2
        return 0. * x, variance**.5

    def ancestral(self, x, s, z, i, n):
        """x_{i-1} = x + G^2 s + G sigma_{i-1} / sigma_i z. [SDE eq. 47]"""
        _, G = self.discretize(x, i, n)
        std = G * self.level(i - 1, n) / self.level(i, n)
        return x + G**2 * s + std * z


@dataclass(frozen=True)
class EDM(_SDE):
    """VE whose time is the noise level. [EDM sec. 3]

        sigma(t) = t,  a = 1,  g = sqrt(2 t),  T = sigma_max
    """

    sigma_max: float = 80.

    def __post_init__(self):
        self.__dict__.update(check_domain(sigma_max=self.sigma_max))

    @property
    def T(self):
        """sigma_max: the time is the noise level."""
        return self.sigma_max

    prior_std = T

    def diffusion(self, t):
        """g = sqrt(2 t)."""
        return (2 * np.asarray(t, np.float64))**.5

    def marginal(self, t):
        """(1, t)."""
        return 1., np.asarray(t, np.float64)[()]

    def time(self, ratio):
        """The ratio itself."""
        return np.asarray(ratio, np.float64)[()]


@dataclass(frozen=True)
class _LinearBeta(_SDE):
    """What VP and sub-VP share.

        beta(t) = bmin + t (bmax - bmin),  f = -beta x / 2,  a = exp(-1/2 int_0^t beta)
    """

    beta_min: float = .1
    beta_max: float = 20.

    def __post_init__(self):
        low, high = check_range(beta_min=self.beta_min, beta_max=self.beta_max)
        self.__dict__.update(beta_min=low, beta_max=high)

    @property
    def slope(self):
        """bmax - bmin, the slope of beta(t)."""
        return self.beta_max - self.beta_min

    def beta(self, t):
        """bmin + t (bmax - bmin)."""
        return self.beta_min + np.asarray(t, np.float64) * self.slope

    def log_a(self, t):
        """ln a = -1/2 int_0^t beta."""
        t = np.asarray(t, np.float64)
        return -t**2 * self.slope / 4 - t * self.beta_min / 2

    def drift(self, x, t):
        """f = -beta(t) x / 2."""
        return -.5 * self.beta(t) * x

    def time(self, ratio):
        """The t at which sigma / a is the ratio: int_0^t beta is integral_at(ratio)."""
        integral = self.integral_at(ratio)
        root = (self.beta_min**2 + 2 * self.slope * integral)**.5
        return 2 * integral / (self.beta_min + root)


class VP(_LinearBeta):
    """Variance preserving, DDPM's limit: g = sqrt(beta(t)), sigma = sqrt(1 - a^2).

    sigma is computed by expm1, so that a small t keeps its digits. [SDE eqs. 29 and 32]
    Its chain is DDPM: f_i = sqrt(1 - beta_i) x - x and G_i = sqrt(beta_i), where
    beta_i = beta(i / (n - 1)) / n.
    """

    def diffusion(self, t):
        """g = sqrt(beta(t))."""
        return self.beta(t)**.5

    def marginal(self, t):
        """(a, sqrt(1 - a^2))."""
        log_a = self.log_a(t)
        return np.exp(log_a), (-np.expm1(2 * log_a))**.5

    def integral_at(self, ratio):
        """int beta where sqrt(1 - a^2) / a = ratio."""
        return np.log1p(np.asarray(ratio, np.float64)**2)

    def kappa(self, t, dt):
        """1 - beta(t) dt, alpha of a chain with this dt. [SDE Algorithm 5]"""
        return 1 - self.beta(t) * dt

    def discretize(self, x, i, n):
        """(sqrt(1 - beta_i) x - x, sqrt(beta_i)): DDPM's forward step."""
        beta = self.beta(np.asarray(i) / (n - 1)) / n
        f = ddpm.forward_step(x, 0., beta) - x
        return f, ddpm.forward_step(0., 1., beta)

    def ancestral(self, x, s, z, i, n):
        """x_{i-1} by `ddpm.ancestral_step` with variance beta_i. [SDE eq. 4]"""
        _, G = self.discretize(x, i, n)
        return ddpm.ancestral_step(x, s, z, G**2, G**2)


class SubVP(_LinearBeta):
    """Sub-VP: VP's drift and less noise. [SDE eqs. 12 and 29, which states sigma^2]

        g = sqrt(beta (1 - a^4)),  sigma = 1 - a^2

    It has no betas of a chain, so its chain is Euler-Maruyama's.
    """

    def diffusion(self, t):
        """g = sqrt(beta (1 - a^4))."""
        one_less_a4 = -np.expm1(4 * self.log_a(t))
        return (self.beta(t) * one_less_a4)**.5

    def marginal(self, t):
        """(a, 1 - a^2)."""
        log_a = self.log_a(t)
        return np.exp(log_a), -np.expm1(2 * log_a)

    def integral_at(self, ratio):
        """int beta where (1 - a^2) / a = ratio."""
        return 2 * np.arcsinh(np.asarray(ratio, np.float64) / 2)


def prior_std(sde):
    """The std of the prior N(0, std^2 I): sigma_max for VE and EDM, 1 for VP and sub-VP."""
    return sde.prior_std


def importance_times(sde, u, t_min=1e-5):
    """(t, Z) from u ~ U(0, 1]: t has density g^2 / (Z sigma^2) on [t_min, T].

    So the mean of Z sigma^2 |..|^2 is the integral of g^2 |..|^2. As g^2 / sigma^2 =
    2 d/dt ln(sigma / a), it is ln(sigma / a) that is uniform. [ScoreFlow: Song et al. 2021]
    """
    checked = check_domain(u=u, t_min=t_min, sde=sde, t=t_min)

    def log_ratio(t):
        a, sigma = sde.marginal(t)
        return np.log(sigma / a)

    low = log_ratio(checked["t_min"])
    length = log_ratio(sde.T) - low
    ratio = np.exp(low + length * checked["u"])
    return sde.time(ratio), 2 * length


def perturb(x0, z, /, a, sigma):
    """x_t = a x_0 + sigma z: a sample of the marginal in one step. [SDE eq. 29, DDPM eq. 4]

    It is DDPM's x_i where a^2 = alpha_bar and sigma^2 = 1 - alpha_bar.
    """
    return a * x0 + sigma * z


def forward_sde_step(x, z, /, sde, t, dt):
    """x' = x + f(x, t) dt + g(t) sqrt(dt) z: Euler-Maruyama, forwards. [SDE eq. 5]"""
    return x + sde.drift(x, t) * dt + sde.diffusion(t) * dt**.5 * z


@order(1)
def reverse_sde_step(x, s, z, /, sde, t, dt):
    """x' = x - [f(x, t) - g^2 s] dt + g sqrt(dt) z. [SDE eq. 6; Anderson 1982]

    Euler-Maruyama on the reverse-time SDE, of weak order 1.
    """
    g = sde.diffusion(t)
    drift = sde.drift(x, t) - g**2 * s
    return x - drift * dt + g * dt**.5 * z


@order(1)
def reverse_diffusion_step(x, s, z, /, sde, i, n):
    """x_{i-1} = x_i - f_i(x_i) + G_i^2 s + G_i z. [SDE eq. 46]

    The SDE's own chain, reversed: i = n-1 ... 0.
    """
    f, G = sde.discretize(x, i, n)
    return x - f + G**2 * s + G * z


@order(1)
def ancestral_step(x, s, z, /, sde, i, n):
    """x_{i-1} from x_i, by ancestral sampling of VE's or VP's chain. [SDE eqs. 4 and 47]"""
    return sde.ancestral(x, s, z, i, n)


def flow(x, s, sde, t):
    """f~ = f(x, t) - 1/2 g^2 s, the velocity of the probability-flow ODE. [SDE eq. 13]

    It is linear in x and s, so its divergence is flow(D, tr grad s, sde, t), D the
    dimension.
    """
    return sde.drift(x, t) - .5 * sde.diffusion(t)**2 * s


@order(1)
def pf_ode_step(x, s, /, sde, t, dt):
    """x' = x - f~ dt: Euler on the probability-flow ODE."""
    return x - flow(x, s, sde, t) * dt


@order(2)
def heun_step(x, s, s_next, /, sde, t, dt):
    """x' = (x + x'') / 2, where x'' is two Euler steps on. [EDM Alg. 1]

    So the slope is the mean of two. s_next: the score at (pf_ode_step(x, s), t - dt),
    where t > dt.
    """
    x_euler = pf_ode_step(x, s, sde, t, dt)
    return .5 * (x + pf_ode_step(x_euler, s_next, sde, t - dt, dt))
