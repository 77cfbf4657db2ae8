"""Distributions known exactly at every noise level: the oracles.

If x0 ~ p then x_t = a x0 + sigma z has a density of the same family; `at(a, sigma)`
returns it, whatever SDE the two numbers came from. Points are (..., D) arrays.
"""

from dataclasses import dataclass

import numpy as np

from . import noise


@dataclass(frozen=True)
class Gaussian:
    """N(mean, diag(variance)); mean (D,), variance a scalar or (D,)."""

    mean: np.ndarray
    variance: np.ndarray

    def __post_init__(self):
        mean, variance = np.broadcast_arrays(np.atleast_1d(self.mean).astype(np.float64),
                                             np.asarray(self.variance, np.float64))
        if not ((variance > 0).all() and np.isfinite(mean).all()):
            raise ValueError("variance must be positive and mean finite")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "variance", variance)

    def at(self, a, sigma):
        """x_t ~ N(a mean, a^2 variance + sigma^2)."""
        return Gaussian(a * self.mean, a**2 * self.variance + sigma**2)

    def log_density(self, x):
        """log p(x) = -1/2 sum [(x - mean)^2 / variance + ln(2 pi variance)], shape (...)."""
        return -.5 * ((x - self.mean)**2 / self.variance
                      + np.log(2 * np.pi * self.variance)).sum(-1)

    def score(self, x):
        """grad_x log p(x) = (mean - x) / variance, shape (..., D)."""
        return (self.mean - x) / self.variance

    def jacobian_trace(self, x):
        """tr grad_x s(x) = -sum 1/variance, shape (...)."""
        return np.broadcast_to(-(1 / self.variance).sum(), x.shape[:-1])

    def sample(self, n, seed=0, sample=0):
        """n points, (n, D)."""
        z = noise.normal((n, self.mean.size), seed, sample, tag=noise.DATA)
        return self.mean + self.variance**.5 * z


@dataclass(frozen=True)
class Mixture:
    """sum_k w_k N(m_k, v_k I): weights (K,), means (K, D), variances a scalar or (K,)."""

    weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray

    def __post_init__(self):
        weights, means = (np.asarray(v, np.float64) for v in (self.weights, self.means))
        if means.ndim != 2 or weights.shape != means.shape[:1]:
            raise ValueError(f"weights must be (K,) and means (K, D), got {weights.shape} "
                             f"and {means.shape}")
        variances = np.broadcast_to(np.asarray(self.variances, np.float64), weights.shape)
        if not (weights.size and np.isfinite([weights.sum(), means.sum()]).all()
                and (weights > 0).all() and (variances > 0).all()):
            raise ValueError("weights and variances must be positive, weights and means finite")
        object.__setattr__(self, "weights", weights / weights.sum())
        object.__setattr__(self, "means", means)
        object.__setattr__(self, "variances", variances)

    def at(self, a, sigma):
        """x_t ~ sum_k w_k N(a m_k, (a^2 v_k + sigma^2) I)."""
        return Mixture(self.weights, a * self.means, a**2 * self.variances + sigma**2)

    def _components(self, x):
        """log(w_k p_k(x)), (..., K), each component's score (..., K, D), and gamma (..., K)."""
        difference = self.means - np.asarray(x)[..., None, :]
        v = self.variances
        log_p = (np.log(self.weights) - .5 * self.means.shape[1] * np.log(2 * np.pi * v)
                 - (difference**2).sum(-1) / (2 * v))
        gamma = np.exp(log_p - np.logaddexp.reduce(log_p, -1, keepdims=True))
        return log_p, difference / v[:, None], gamma

    def log_density(self, x):
        """log p(x) = log sum_k w_k p_k(x), shape (...)."""
        return np.logaddexp.reduce(self._components(x)[0], -1)

    def responsibilities(self, x):
        """gamma_k = w_k p_k(x) / p(x), shape (..., K)."""
        return self._components(x)[2]

    def score(self, x):
        """grad_x log p(x) = sum_k gamma_k s_k,  s_k = (m_k - x) / v_k; shape (..., D)."""
        _, s_k, gamma = self._components(x)
        return (gamma[..., None] * s_k).sum(-2)

    def jacobian_trace(self, x):
        """tr grad_x s = sum_k gamma_k (|s_k|^2 - D / v_k) - |s|^2, shape (...)."""
        _, s_k, gamma = self._components(x)
        inner = (s_k**2).sum(-1) - self.means.shape[1] / self.variances
        return (gamma * inner).sum(-1) - ((gamma[..., None] * s_k).sum(-2)**2).sum(-1)

    def sample(self, n, seed=0, sample=0):
        """n points, (n, D): a component by its weight, then a normal about its mean."""
        u = noise.uniform((n,), seed, sample, tag=noise.CHOICE)
        k = np.searchsorted(np.cumsum(self.weights)[:-1], u)
        z = noise.normal((n, self.means.shape[1]), seed, sample, tag=noise.DATA)
        return self.means[k] + self.variances[k, None]**.5 * z
