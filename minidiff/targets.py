"""Distributions known exactly at every noise level: the oracles.

If x0 ~ p then x_t = a x0 + sigma z has a density of the same family; `at(a, sigma)`
returns it, whatever SDE the two numbers came from. Points are (..., D) arrays.
"""

from dataclasses import dataclass

import numpy as np

from . import noise


@dataclass(frozen=True)
class Mixture:
    """sum_k w_k N(m_k, diag(v_k)): weights (K,), means (K, D), variances a scalar, (K,) or
    (K, D)."""

    weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray

    def __post_init__(self):
        weights, means, variances = (np.asarray(v, np.float64) for v in (
            self.weights, self.means, self.variances))
        if means.ndim != 2 or weights.shape != means.shape[:1]:
            raise ValueError(f"weights must be (K,), means (K, D): {weights.shape}, {means.shape}")
        variances = np.broadcast_to(variances[:, None] if variances.ndim == 1 else variances,
                                    means.shape)
        if not (weights.size and np.isfinite([weights.sum(), means.sum()]).all()
                and (weights > 0).all() and (variances > 0).all()):
            raise ValueError("weights and variances must be positive, weights and means finite")
        self.__dict__.update(weights=weights / weights.sum(), means=means, variances=variances)

    def at(self, a, sigma):
        """x_t ~ sum_k w_k N(a m_k, a^2 v_k + sigma^2)."""
        a, sigma = np.asarray(a, np.float64), np.asarray(sigma, np.float64)
        return Mixture(self.weights, a * self.means, a**2 * self.variances + sigma**2)

    def _components(self, x):
        """log(w_k p_k(x)), each component's score s_k (..., K, D), gamma_k = w_k p_k(x) / p(x)."""
        if np.shape(x)[-1:] != self.means.shape[1:]:
            raise ValueError(f"x must be (..., {self.means.shape[1]}), got {np.shape(x)}")
        difference, v = self.means - np.asarray(x)[..., None, :], self.variances
        s_k = difference / v
        log_p = np.log(self.weights) - .5 * (np.einsum("...kd,...kd->...k", difference, s_k)
                                             + np.log(2 * np.pi * v).sum(-1))
        return log_p, s_k, np.exp(log_p - np.logaddexp.reduce(log_p, -1, keepdims=True))

    def log_density(self, x):
        """log p(x) = log sum_k w_k p_k(x), shape (...)."""
        return np.logaddexp.reduce(self._components(x)[0], -1)

    def score(self, x):
        """grad_x log p(x) = sum_k gamma_k s_k,  s_k = (m_k - x) / v_k; shape (..., D)."""
        _, s_k, gamma = self._components(x)
        return np.einsum("...k,...kd->...d", gamma, s_k)

    def jacobian_trace(self, x):
        """tr grad_x s = sum_k gamma_k (|s_k|^2 - sum 1 / v_k) - |s|^2, shape (...)."""
        _, s_k, gamma = self._components(x)
        inner = (s_k**2 - 1 / self.variances).sum(-1)
        return (gamma * inner).sum(-1) - (self.score(x)**2).sum(-1)

    def sample(self, n, seed=0, sample=0):
        """n points, (n, D): a component by its weight, then a normal about its mean."""
        u = noise.uniform((n,), seed, sample, tag=noise.CHOICE)
        k = np.searchsorted(np.cumsum(self.weights)[:-1], u)
        z = noise.normal((n, self.means.shape[1]), seed, sample, tag=noise.DATA)
        return self.means[k] + self.variances[k]**.5 * z


def Gaussian(mean, variance):
    """N(mean, diag(variance)), a mixture of one: mean (D,), variance a scalar or (D,)."""
    mean = np.atleast_1d(mean)
    return Mixture([1.], mean[None], np.broadcast_to(variance, (1, mean.size)))
