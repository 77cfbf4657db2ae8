"""Exact likelihood: the probability flow as a continuous normalizing flow.

A crowd of points that moves by dx = f~ dt grows denser where f~ converges. Along a point's
path the density changes by the divergence of f~ alone, d log p(x_t) / dt = -div f~. So
carry a sample from the data to the noise, where the density is known, and add up:

    log p_0(x_0) = log p_T(x_T) + int_0^T div f~(x_t, t) dt                     [SDE eq. 39]

The divergence needs the trace of the score's Jacobian: exact for a few dimensions, by
random probes for many. It is no bound: what is left to err are the score, the integrator,
the probes, the prior in the place of p_T, and t_min, a little noise in the place of none.
Next: `guidance`, samples of p(x | y).

Points are (B, D) arrays; an image is flattened. `linearize`(x, t) returns what
torch.func.vjp does: (s, vjp), the score (B, D) and the function v -> v^T grad s, (B, D).
"""

import numpy as np

from .arguments import check_domain, require_shape
from .samplers import rk45
from .sde import flow


def with_trace(linearize, probes):
    """The function (x, t) -> (s, sum of v^T (grad s) v over the probes v).

    It takes one vector-Jacobian product a probe. probes: [v] with E v v^T = I for
    Hutchinson's estimate [SDE eq. 40], v of (B, D), normal or Rademacher: a probe a sample,
    the same at every t. np.eye(D) gives the exact trace, for small D.
    """
    def score_and_trace(x, t):
        s, vjp = linearize(x, t)
        trace = 0
        for v in probes:
            v = np.broadcast_to(v, x.shape)
            product = require_shape(x, vjp(v), "product")
            trace = trace + (product * v).sum(-1)
        return s, trace
    return score_and_trace


def log_likelihood(score_and_trace, x, sde, prior, *, t_min=1e-5, rtol=1e-5, atol=1e-5):
    """(log p(x), x_T, evaluations): nats (B,), the flow's end (B, D), calls of the score.

    p is the density at t_min; x: (B, D). score_and_trace(x, t) returns (s, tr grad s).
    prior(x_T) returns log p_T; for N(0, std^2 I) pass
    `targets.Gaussian(np.zeros(D), prior_std(sde)**2).log_density`. One step size of RK45
    serves the batch, so within the tolerances each sample depends on the others.
    ValueError unless x is (B, D) and 0 < t_min < T, and for results of other shapes;
    FloatingPointError where the flow is not finite.

    Example:
        >>> from minidiff.sde import VP
        >>> from minidiff.targets import Gaussian
        >>> normal = Gaussian([0., 0.], 1.)  # VP leaves it as it is, at every t
        >>> exact = lambda x, t: (normal.score(x), normal.jacobian_trace(x))
        >>> x = np.array([[1., -2.]])
        >>> log_p, x_T, _ = log_likelihood(exact, x, VP(), normal.log_density)
        >>> print(log_p.round(4), normal.log_density(x).round(4))
        [-4.3379] [-4.3379]
    """
    def velocity(state, t):
        x_t = state[:, :-1]
        s, trace = score_and_trace(x_t, t)
        require_shape(x_t, s)
        require_shape(state[:, -1], trace, "trace")
        divergence = flow(x.shape[1], trace, sde, t)
        return np.column_stack((flow(x_t, s, sde, t), divergence))

    t_min = check_domain(sde=sde, t=t_min, t_min=t_min)["t_min"]
    if np.ndim(x) != 2 or t_min == sde.T:
        raise ValueError("need x of (B, D) and t_min before T, "
                         f"got {np.shape(x)} and {t_min}")
    x = np.asarray(x, np.float64)
    start = np.column_stack((x, np.zeros(len(x))))
    states, evaluations = rk45(velocity, start, t_min, [sde.T], rtol, atol)
    x_T = states[-1, :, :-1]
    integral = states[-1, :, -1]
    log_p_T = require_shape(integral, prior(x_T), "prior")
    return log_p_T + integral, x_T, evaluations


def dequantize(k, u, levels):
    """2 (k + u) / levels - 1: grey levels as points. [Theis et al. 2016]

    A density of whole numbers could be as high as one likes. With u ~ U[0, 1] added it
    cannot, and its mean log is at most that of the numbers themselves.
    k = 0 ... levels - 1, u in [0, 1]; the result is in [-1, 1].

    Example:
        >>> print(dequantize(np.array([0, 3]), .5, levels=4))
        [-0.75  0.75]
    """
    return 2 * (k + u) / levels - 1


def bits_per_dim(log_p, size, levels=2):
    """Bits a dimension, -log p / (D ln 2) + log2(levels / 2): log p in nats, D = size.

    Where log p is that of dequantised grey levels, it is at least the bits/dim of the
    levels themselves; the last term is 7 for 256 levels. A density has levels = 2, which
    adds nothing.

    Example:
        >>> log_p = np.log(1 / 2**10)  # a uniform density on [-1, 1]^10
        >>> print(bits_per_dim(log_p, 10, levels=256).round(4))  # knows nothing: log2(256)
        8.0
    """
    return -log_p / (size * np.log(2)) + np.log2(levels / 2)
