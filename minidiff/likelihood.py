"""Exact likelihood: the probability-flow ODE dx = f~ dt as a continuous normalizing flow.

    log p_0(x_0) = log p_T(x_T) + int_0^T div f~(x_t, t) dt                     [SDE eq. 39]

`linearize`(x, t) -> (s, vjp), the score (B, D) and the function v -> v' grad s, (B, D), is
what torch.func.vjp returns; points are (B, D) arrays (images flattened).
"""

import numpy as np

from .arguments import check_domain, require_shape
from .samplers import rk45
from .sde import flow


def with_trace(linearize, probes):
    """(x, t) -> (s, sum of v' (grad s) v over the probes v), one product a probe.

    probes: [v], E v v' = I, for Hutchinson's estimate [SDE eq. 40]: (B, D), normal or Rademacher,
    one a sample and the same at every t; np.eye(D) for the exact trace of small D.
    """
    def score_and_trace(x, t):
        s, vjp = linearize(x, t)
        full = (np.broadcast_to(v, x.shape) for v in probes)
        return s, sum((require_shape(x, vjp(v), "product") * v).sum(-1) for v in full)
    return score_and_trace


def log_likelihood(score_and_trace, x, sde, prior, t_min=1e-5, rtol=1e-5, atol=1e-5):
    """(log p(x) in nats, (B,); x_T; evaluations of the score), p the density at t_min.

    score_and_trace(x, t) -> (s, tr grad s); prior(x_T) -> log p_T, as N(0, std^2 I)'s
    `targets.Gaussian(np.zeros(D), prior_std(sde)**2).log_density`. x: (B, D). RK45 with one step
    size for the batch, which so affects every sample within the tolerances.
    """
    def velocity(state, t):
        s, trace = score_and_trace(state[:, :-1], t)
        require_shape(state[:, :-1], s), require_shape(state[:, -1], trace, "trace")
        return np.column_stack((flow(state[:, :-1], s, sde, t), flow(x.shape[1], trace, sde, t)))

    t_min = check_domain(sde=sde, t=t_min, t_min=t_min)["t_min"]
    if np.ndim(x) != 2 or t_min == sde.T:
        raise ValueError(f"need x of (B, D) and t_min before T, got {np.shape(x)} and {t_min}")
    x = np.asarray(x, np.float64)
    start = np.column_stack((x, np.zeros(len(x))))
    states, evaluations = rk45(velocity, start, t_min, [sde.T], rtol, atol)
    x_T, integral = states[-1, :, :-1], states[-1, :, -1]
    return require_shape(integral, prior(x_T), "prior") + integral, x_T, evaluations


def dequantize(k, u, levels):
    """2 (k + u) / levels - 1: grey levels k = 0 ... levels - 1 to a density on [-1, 1], u in
    [0, 1]. [Theis et al. 2016, sec. 3.1]"""
    return 2 * (k + u) / levels - 1


def bits_per_dim(log_p, size, levels=2):
    """-log p / (D ln 2) + log2(levels / 2): of the grey levels, at most, where log p is that of
    their dequantised form (7 for 256); of a density where there are none. D = size."""
    return -log_p / (size * np.log(2)) + np.log2(levels / 2)
