"""Distributions known exactly at every noise level: the oracles.

If x0 ~ p is a mixture of Gaussians, so is x_t = a x0 + sigma z. `noised(a, sigma)` returns
it, whatever SDE the two numbers came from. Points are (..., D) arrays.
"""

from dataclasses import dataclass

import numpy as np

from . import noise


@dataclass(frozen=True)
class Mixture:
    """sum_k w_k N(m_k, diag(v_k)).

    weights (K,), positive, made to add up to 1; means (K, D); variances, positive, a
    scalar, (K,) or (K, D). ValueError for other shapes and ranges.
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
        """The distribution of a x0 + sigma z: sum_k w_k N(a m_k, a^2 v_k + sigma^2)."""
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
        """log p(x) = log sum_k w_k p_k(x), shape (...)."""
        log_p, _, _ = self._components(x)
        return np.logaddexp.reduce(log_p, -1)

    def score(self, x):
        """grad_x log p(x) = sum_k gamma_k s_k,  s_k = (m_k - x) / v_k; shape (..., D)."""
        _, s_k, gamma = self._components(x)
        return np.einsum("...k,...kd->...d", gamma, s_k)

    def jacobian_trace(self, x):
        """tr grad_x s = sum_k gamma_k (|s_k|^2 - sum 1 / v_k) - |s|^2, shape (...)."""
        _, s_k, gamma = self._components(x)
        inner = (s_k**2 - 1 / self.variances).sum(-1)
        square = (self.score(x)**2).sum(-1)
        return (gamma * inner).sum(-1) - square

    def sample(self, n, seed=0, sample=0):
        """n points, (n, D): a component by its weight, then a normal about its mean."""
        u = noise.uniform((n,), seed, sample, tag=noise.CHOICE)
        k = np.searchsorted(np.cumsum(self.weights)[:-1], u)
        D = self.means.shape[1]
        z = noise.normal((n, D), seed, sample, tag=noise.DATA)
        return self.means[k] + self.variances[k]**.5 * z


def Gaussian(mean, variance):
    """N(mean, diag(variance)), a mixture of one: mean (D,), variance a scalar or (D,)."""
    mean = np.atleast_1d(mean)
    variances = np.broadcast_to(variance, (1, mean.size))
    return Mixture([1.], mean[None], variances)
