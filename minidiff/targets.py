"""Distributions known exactly at every noise level: the oracles.

The score of a density p is grad_x log p(x): at every point an arrow that says in which
direction, and how fast, log p rises. It is a derivative with respect to the data x, not to
a parameter. A constant factor of p is a constant added to log p, and has no gradient: so a
model of the score, any vector field, never has to integrate to 1. And yet, as these
chapters show, a score is enough to draw samples and to compute likelihoods.

Everything that is later learned is known here. A mixture of Gaussians has a score in closed
form, and with noise added, x_t = a x_0 + sigma z, it is a mixture again. So objectives,
samplers and solvers can be tried and proved with an exact score, before any network.

Points are (..., D) arrays. Next: `score_matching`, how a score is learned from samples.
"""

from dataclasses import dataclass

import numpy as np

from . import noise


@dataclass(frozen=True)
class Mixture:
    """p = sum_k w_k N(m_k, diag(v_k)), a mixture of K Gaussians.

    weights (K,), positive, made to add up to 1; means (K, D); variances, positive, a
    scalar, (K,) or (K, D). ValueError for other shapes and ranges.

    Example:
        >>> data = Mixture([1, 4], [[-5, -5], [5, 5]], 1.)
        >>> print(data.weights)
        [0.2 0.8]
    """

    weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray

    def __post_init__(self):
        weights = np.asarray(self.weights, np.float64)
        means = np.asarray(self.means, np.float64)
        variances = np.asarray(self.variances, np.float64)
        if means.ndim != 2 or weights.shape != means.shape[:1]:
            raise ValueError("weights must be (K,), means (K, D): "
                             f"{weights.shape}, {means.shape}")
        if variances.ndim == 1:
            variances = variances[:, None]
        variances = np.broadcast_to(variances, means.shape)
        finite = weights.size and np.isfinite([weights.sum(), means.sum()]).all()
        if not (finite and (weights > 0).all() and (variances > 0).all()):
            raise ValueError("weights and variances must be positive, "
                             "weights and means finite")
        weights = weights / weights.sum()
        self.__dict__.update(weights=weights, means=means, variances=variances)

    def noised(self, a, sigma):
        """The distribution of x_t = a x_0 + sigma z, where x_0 is of this one.

            sum_k w_k N(a m_k, a^2 v_k + sigma^2)

        Noise adds its variance to each component, and the whole stays a mixture. The two
        numbers say all that a process has done to the data, whichever process it was.

        Example:
            >>> data = Mixture([1, 4], [[-5], [5]], 1.)
            >>> noised = data.noised(.5, 2.)
            >>> print(noised.means.ravel(), noised.variances.ravel())
            [-2.5  2.5] [4.25 4.25]
        """
        a = np.asarray(a, np.float64)
        sigma = np.asarray(sigma, np.float64)
        return Mixture(self.weights, a * self.means, a**2 * self.variances + sigma**2)

    def _components(self, x):
        """Of each component log(w_k p_k(x)), the score s_k and gamma_k = w_k p_k(x) / p(x).

        Shapes (..., K), (..., K, D) and (..., K).
        """
        if np.shape(x)[-1:] != self.means.shape[1:]:
            raise ValueError(f"x must be (..., {self.means.shape[1]}), got {np.shape(x)}")
        v = self.variances
        difference = self.means - np.asarray(x)[..., None, :]
        s_k = difference / v
        square = np.einsum("...kd,...kd->...k", difference, s_k)
        log_volume = np.log(2 * np.pi * v).sum(-1)
        log_p = np.log(self.weights) - .5 * (square + log_volume)
        gamma = np.exp(log_p - np.logaddexp.reduce(log_p, -1, keepdims=True))
        return log_p, s_k, gamma

    def log_density(self, x):
        """log p(x) = log sum_k w_k p_k(x), in nats; x (..., D), the result (...).

        Example:
            >>> print(Gaussian([0.], 1.).log_density(np.array([0.])).round(4))
            -0.9189
        """
        log_p, _, _ = self._components(x)
        return np.logaddexp.reduce(log_p, -1)

    def score(self, x):
        """The score at x, (..., D), as x.

            grad_x log p(x) = sum_k gamma_k (m_k - x) / v_k

        Each component pulls toward its mean, in proportion to gamma_k = w_k p_k(x) / p(x),
        the odds that x came from it.

        Example:
            >>> data = Mixture([1, 4], [[-5], [5]], 1.)
            >>> print(data.score(np.array([[4.], [6.]])).ravel())
            [ 1. -1.]
        """
        _, s_k, gamma = self._components(x)
        return np.einsum("...k,...kd->...d", gamma, s_k)

    def jacobian_trace(self, x):
        """tr grad_x s(x), the divergence of the score, (...).

            sum_k gamma_k (|s_k|^2 - sum_d 1 / v_kd) - |s|^2,   s_k = (m_k - x) / v_k

        Implicit score matching and the likelihood need it.

        Example:
            >>> print(Gaussian([0., 0.], .5).jacobian_trace(np.array([1., 2.])))
            -4.0
        """
        _, s_k, gamma = self._components(x)
        inner = (s_k**2 - 1 / self.variances).sum(-1)
        square = (self.score(x)**2).sum(-1)
        return (gamma * inner).sum(-1) - square

    def sample(self, n, seed=0, sample=0):
        """n points, (n, D): a component by its weight, then a normal about its mean.

        seed, sample: as in `noise.normal`; point b depends on seed and sample + b alone.

        Example:
            >>> data = Mixture([1, 4], [[-5], [5]], 1.)
            >>> print((data.sample(10000, seed=0) < 0).mean().round(2))
            0.2
        """
        u = noise.uniform((n,), seed, sample, tag=noise.CHOICE)
        k = np.searchsorted(np.cumsum(self.weights)[:-1], u)
        D = self.means.shape[1]
        z = noise.normal((n, D), seed, sample, tag=noise.DATA)
        return self.means[k] + self.variances[k]**.5 * z


def Gaussian(mean, variance):
    """N(mean, diag(variance)), a mixture of one: mean (D,), variance a scalar or (D,).

    Its score is linear, so on it every sampler is an affine map, with an exact law.

    Example:
        >>> print(Gaussian([1., 2.], .25).score(np.array([1., 1.])))
        [0. 4.]
    """
    mean = np.atleast_1d(mean)
    variances = np.broadcast_to(variance, (1, mean.size))
    return Mixture([1.], mean[None], variances)
