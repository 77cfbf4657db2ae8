"""Diffusions in continuous time, dx = f(x, t) dt + g(t) dw on [0, T], and their reversal.

Let SMLD's noise levels, or DDPM's steps, become infinitely many: data turn into noise
along a stochastic differential equation. f, where there is one, shrinks the data; g adds
noise. Such a process runs backwards too, and the reversed one is again a diffusion. One
thing in it is unknown, the score s of p_t, the distribution at time t [Anderson 1982]:

    dx = [f - g^2 s] dt + g dw            with t from T down to 0        [SDE eq. 6]

And there is an ODE, the probability flow, with the same distributions. A point drawn from
p_T that moves along it is distributed as p_t at every t:

    dx = [f - g^2 s / 2] dt               likewise                       [SDE eq. 13]

There dt < 0, so that the score's term leads uphill, and w is run backwards too. The
functions below take dt > 0 and turn the sign.

So a score turns noise into data in two ways. The second is a map that can be inverted, and
along it a density changes in a known way: exact likelihoods, see `likelihood`.

In the five processes here f is linear in x, and so x_t = a x_0 + sigma z [SDE eq. 29]. At
t = 0 that is the data, in VE the data with noise smin. At T they are lost in noise. In VP
and sub-VP f = -beta(t) x / 2, where beta rises evenly, by default from .1 to 20; B is its
integral from 0 to t:

    process   a(t)           sigma(t)               at T, nearly
    VE        1              smin (smax / smin)^t   N(0, smax^2 I)   SMLD's limit
    VP        exp(-B / 2)    sqrt(1 - a^2)          N(0, I)          DDPM's limit
    sub-VP    exp(-B / 2)    1 - a^2                N(0, I)          VP with less noise
    EDM       1              t                      N(0, T^2 I)      VE whose time is sigma
    flow      1 - t          t                      N(0, I)          straight paths

What a process has:

    drift(x, t)            f
    diffusion(t)           g
    marginal(t)            (a, sigma) of x_t = a x_0 + sigma z
    time(ratio)            the t at which sigma / a is that ratio
    prior_std              the std of N(0, std^2 I), where the reverse process starts
    kappa(t, dt)           a factor of a corrector's step size, see `solvers`
    discretize(x, i, n)    (f_i, G_i) of its own chain of n > 1 steps,
                           x_i = x_{i-1} + f_i + G_i z

Times are host floats or NumPy arrays. A step of size dt > 0 goes from t to t + dt forwards,
and from t to t - dt in reverse. Operands have one shape; s is the score at (x, t) and
z ~ N(0, I). [SDE: Song et al. 2021, "Score-based generative modeling through SDEs"]

Next: `solvers`, which take fewer and better steps; then `samplers`, the loops.
"""

from dataclasses import dataclass

import numpy as np

from . import ddpm
from .affine import order
from .arguments import check_domain, check_range


class _SDE:
    """Defaults: drift 0, kappa 1, a chain of Euler-Maruyama's steps."""

    T = 1.
    prior_std = 1.

    def drift(self, x, t):
        """f(x, t) = 0."""
        return 0. * x

    def discretize(self, x, i, n):
        """(f_i, G_i) of Euler-Maruyama's step at t = i T / (n - 1), with dt = T / n.

        n indices from 0 to T, and n steps: the published code's grid, as VE's and VP's are.
        """
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

    The data stay where they are, and noise is piled on them. At t = 0 sigma is smin, where
    the paper has 0. Its chain [SDE eq. 8] has sigma_i = sigma(i / (n - 1)), sigma_{-1} = 0
    and G_i^2 = sigma_i^2 - sigma_{i-1}^2, whose sum is smax^2. ValueError unless
    0 < sigma_min <= sigma_max.

    Example:
        >>> print(*VE(.01, 100.).marginal(.5))
        1.0 1.0
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

    Its flow is dx / dt = (x - D) / t, D = E[x_0 | x_t]: straight where D does not change.

    Example:
        >>> print(*EDM().marginal(2.), EDM().diffusion(2.))
        1.0 2.0 2.0
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
    """Variance preserving, DDPM's limit. [SDE eqs. 11, 29 and 32]

        f = -beta(t) x / 2,  g = sqrt(beta(t)),  sigma = sqrt(1 - a^2)

    The data fade as the noise grows, so that data of variance 1 keep it. sigma is made by
    expm1: as 1 - a^2 in float32 it would be off by percents near t = 1e-5. Its chain is
    DDPM: f_i = sqrt(1 - beta_i) x - x and G_i = sqrt(beta_i), where
    beta_i = beta(i / (n - 1)) / n. ValueError unless 0 < beta_min <= beta_max.

    Example:
        >>> a, sigma = VP().marginal(np.array([0., .5, 1.]))
        >>> print(a.round(4), (a**2 + sigma**2).round(4))
        [1.     0.2812 0.0066] [1. 1. 1.]
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
        """1 - beta(t) dt, the alpha of a chain with this dt, as the published code has it.

        The paper's Algorithm 5 writes alpha_i, which its section 2.2 defines as the product
        of all of them.
        """
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

        f = -beta(t) x / 2,  g = sqrt(beta (1 - a^4)),  sigma = 1 - a^2

    Its variance stays below VP's. The paper found it best for likelihoods. It has no betas
    of a chain, so its chain is Euler-Maruyama's. ValueError as for VP.

    Example:
        >>> a, sigma = SubVP().marginal(.5)
        >>> print(round(float(sigma), 4), round(float(1 - a**2), 4))
        0.9209 0.9209
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


@dataclass(frozen=True)
class FlowMatching(_SDE):
    """The process of flow matching and rectified flows: each path is a straight line.
    [Lipman et al. 2023; Liu et al. 2023]

        x_t = (1 - t) x_0 + t z,  f = -x / (1 - t),  g = sqrt(2 t / (1 - t)),  T = .999

    Given x_0 and z the velocity is z - x_0 at all times. The velocity of the probability
    flow is the mean of these at x, `predictions.flow_velocity`, so that its own paths bend,
    but at a steadier velocity than VP's. Reversed as an SDE, or asked for a likelihood, it
    is a process like the others. At t = 1, where the data are gone, f is infinite, and so
    time ends before. Its own chain is exact forwards: x_i is drawn from q(x_i | x_{i-1}) at
    t_i = (i + 1) T / n.

    Example:
        >>> print(*FlowMatching().marginal(.25), FlowMatching().diffusion(.5).round(4))
        0.75 0.25 1.4142
    """

    T = .999
    prior_std = T

    def drift(self, x, t):
        """f = -x / (1 - t)."""
        return -x / (1 - np.asarray(t, np.float64))

    def diffusion(self, t):
        """g = sqrt(2 t / (1 - t))."""
        t = np.asarray(t, np.float64)
        return (2 * t / (1 - t))**.5

    def marginal(self, t):
        """(1 - t, t)."""
        t = np.asarray(t, np.float64)[()]
        return 1 - t, t

    def time(self, ratio):
        """ratio / (1 + ratio)."""
        ratio = np.asarray(ratio, np.float64)[()]
        return ratio / (1 + ratio)

    def discretize(self, x, i, n):
        """(f_i, G_i) of q(x_i | x_{i-1}), a normal: from t_{i-1} to t_i = (i + 1) T / n."""
        a_prev, sigma_prev = self.marginal(np.asarray(i) * self.T / n)
        a, sigma = self.marginal((np.asarray(i) + 1) * self.T / n)
        kept = a / a_prev
        G = (sigma**2 - (kept * sigma_prev)**2)**.5
        return (kept - 1) * x, G


def prior_std(sde):
    """The std of the prior N(0, std^2 I), from which the reverse process starts.

    sigma_max for VE and EDM, 1 for VP and sub-VP, T for flow matching. It is not quite p_T,
    of which the mean is a E[x_0] and the variance a^2 Var[x_0] + sigma^2: with VE and EDM,
    where a = 1, the data's own, small beside sigma_max.

    Example:
        >>> print(prior_std(VE()), prior_std(VP()))
        50.0 1.0
    """
    return sde.prior_std


def importance_times(sde, u, t_min=1e-5):
    """(t, Z) from u ~ U[0, 1]: t has density g^2 / (Z sigma^2) on [t_min, T]. [ScoreFlow]

    Training for the likelihood weights |s + z / sigma|^2 by g^2. That product goes like
    g^2 / sigma^2, which but for VE grows without bound as t falls to 0. Where t is drawn
    from this density instead, and the weight is Z sigma^2, the terms are of similar size
    and the mean is the same integral. As g^2 / sigma^2 = 2 d/dt ln(sigma / a),
    ln(sigma / a) is uniform.

    u: (B,), in [0, 1]; 0 < t_min < T; else ValueError. Returns t (B,) and the number Z.

    Example:
        >>> t, Z = importance_times(VP(), np.array([.5, 1.]))
        >>> print(t.round(4), Z.round(2))
        [0.1144 1.    ] 23.86
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

    Training needs x_t alone, not the path to it. It is DDPM's x_i where a^2 = alpha_bar and
    sigma^2 = 1 - alpha_bar. x0, z: of one shape.

    Example:
        >>> print(perturb(2., 1., a=.5, sigma=.25))
        1.25
    """
    return a * x0 + sigma * z


def forward_sde_step(x, z, /, sde, t, dt):
    """A step of the forward SDE, from t to t + dt: Euler-Maruyama. [SDE eq. 5]

        x' = x + f(x, t) dt + g(t) sqrt(dt) z

    Noise at different times is independent, so variances add: over dt the variance is
    g^2 dt, the std g sqrt(dt).

    Example:
        >>> print(forward_sde_step(1., 1., EDM(), t=2., dt=.25))  # f = 0, g = 2
        2.0
    """
    return x + sde.drift(x, t) * dt + sde.diffusion(t) * dt**.5 * z


@order(1)
def reverse_sde_step(x, s, z, /, sde, t, dt):
    """A step of the reverse-time SDE, from t to t - dt: Euler-Maruyama.
    [SDE eq. 6; Anderson 1982]

        x' = x - [f(x, t) - g^2 s] dt + g sqrt(dt) z

    It undoes the drift, climbs along the score, and is shaken as on the way there. Of weak
    order 1: for small dt the error of its distribution, not of a path, is proportional to
    dt, and twice the steps halve it. What the score and the start get wrong comes on top;
    no step size mends that.

    Example:
        >>> print(reverse_sde_step(1., -1., 1., EDM(), t=2., dt=.25))
        1.0
    """
    g = sde.diffusion(t)
    drift = sde.drift(x, t) - g**2 * s
    return x - drift * dt + g * dt**.5 * z


@order(1)
def reverse_diffusion_step(x, s, z, /, sde, i, n):
    """A step back of the SDE's own chain, i = n-1 ... 0. [SDE eq. 46]

        x_{i-1} = x_i - f_i(x_i) + G_i^2 s + G_i z

    (f_i, G_i) of `discretize`: the step back is discretized as the forward step was.

    Example:
        >>> print(reverse_diffusion_step(1., 0., 1., VE(.01, 1.), i=0, n=10))
        1.01
    """
    f, G = sde.discretize(x, i, n)
    return x - f + G**2 * s + G * z


@order(1)
def ancestral_step(x, s, z, /, sde, i, n):
    """x_{i-1} from x_i, by ancestral sampling of VE's or VP's chain, i = n-1 ... 0.
    [SDE eqs. 4 and 47]

    For VP it is `ddpm.ancestral_step`. Other processes have no such chain.

    Example:
        >>> print(ancestral_step(1., 0., 1., VE(.01, 1.), i=0, n=10))  # to sigma = 0
        1.0
    """
    return sde.ancestral(x, s, z, i, n)


def flow(x, s, sde, t):
    """f~ = f(x, t) - 1/2 g^2 s, the velocity of the probability-flow ODE. [SDE eq. 13]

    Half the score's pull, and no noise. It is linear in x and s, and in D dimensions
    div x = D: so its divergence is flow(D, tr grad s, sde, t).

    Example:
        >>> print(flow(2., -.5, EDM(), t=2.))  # -t s
        1.0
    """
    return sde.drift(x, t) - .5 * sde.diffusion(t)**2 * s


@order(1)
def pf_ode_step(x, s, /, sde, t, dt):
    """x' = x - f~ dt: a step of Euler's along the probability flow, from t to t - dt.
    [SDE eq. 13]

    Example:
        >>> print(pf_ode_step(2., -.5, EDM(), t=2., dt=.5))
        1.5
    """
    return x - flow(x, s, sde, t) * dt


@order(2)
def heun_step(x, s, s_next, /, sde, t, dt):
    """A step of Heun's along the probability flow, from t to t - dt, t > dt. [EDM Alg. 1]

        x' = (x + x'') / 2,   x'' after two Euler steps, the second from t - dt

    So the slope is the mean of those at both ends, and the error of second order. s_next:
    the score at (pf_ode_step(x, s), t - dt).

    Example:
        >>> print(heun_step(2., -.5, -.5, EDM(), t=2., dt=1.))
        1.25
    """
    x_euler = pf_ode_step(x, s, sde, t, dt)
    return .5 * (x + pf_ode_step(x_euler, s_next, sde, t - dt, dt))
