"""Exact likelihood, by the probability flow; and DDPM's bound, by its chain.

**The flow** is a continuous normalizing flow. A crowd of points that moves by dx = f~ dt
grows denser where f~ converges. Along a point's path the density changes by the divergence
of f~ alone, d log p(x_t) / dt = -div f~. So carry a sample from the data to the noise,
where the density is known, and add up:

    log p_0(x_0) = log p_T(x_T) + int_0^T div f~(x_t, t) dt                     [SDE eq. 39]

The divergence needs the trace of the score's Jacobian: exact for a few dimensions, by
random probes for many. It is no bound: what is left to err are the score, the integrator,
the probes, the prior in the place of p_T, and t_min, a little noise in the place of none.

**A chain** has no such formula: x_0 may have come along any path x_N ... x_1. But each of
its steps is a normal, whose density is known, `step_log_density`. Compared with the way
back that knows x_0, q(x_{i-1} | x_i, x_0), the steps bound -log p(x_0) from above,
`variational_bound`. It is this that DDPM's loss was derived from.

Next: `guidance`, samples of p(x | y).

Points are (B, D) arrays; an image is flattened. `linearize`(x, t) returns what
torch.func.vjp does: (s, vjp), the score (B, D) and the function v -> v^T grad s, (B, D).
"""

from math import prod

import numpy as np

from . import ddpm
from .affine import coefficients, operands
from .arguments import check_domain, require_shape, schedule
from .engine import draws
from .noise import PERTURBATION
from .samplers import rk45
from .score_matching import half_square
from .sde import flow, perturb


def points(x):
    """x in float64. ValueError unless it is (B, D)."""
    if np.ndim(x) != 2:
        raise ValueError(f"x must be (B, D), got {np.shape(x)}")
    return np.asarray(x, np.float64)


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
    if t_min == sde.T:
        raise ValueError(f"t_min must be before T, got {t_min}")
    x = points(x)
    start = np.column_stack((x, np.zeros(len(x))))
    states, evaluations = rk45(velocity, start, t_min, [sde.T], rtol, atol)
    x_T = states[-1, :, :-1]
    integral = states[-1, :, -1]
    log_p_T = require_shape(integral, prior(x_T), "prior")
    return log_p_T + integral, x_T, evaluations


def step_log_density(step, x_next, x, *u, **parameters):
    """log p(x' | x) of a sampler's step, (B,) in nats: how probable this move was.

        x' = mean(x, u) + c z,  log p = -|z|^2 / 2 - D log(c sqrt(2 pi))

    Reinforcement learning on samplers follows its gradient [Black et al. 2023]. step: one
    that draws noise, such as `ddpm.ancestral_step`; x, u: its operands but for z, and its
    parameters, numbers. x', x, u: arrays or tensors of one shape, (B, D) or images
    (B, ...), of D numbers each; not of 16 bits, in which the sum would be too coarse.
    ValueError where c = 0: such a step has no density.

    Example:
        >>> from minidiff.langevin import langevin_step
        >>> x, s = np.array([[1., -1.]]), np.array([[0., 0.]])
        >>> print(step_log_density(langevin_step, x, x, s, eps=1.).round(4))  # z = 0
        [-1.8379]
    """
    row = coefficients(step, **parameters)
    names = operands(step)
    if names[-1] == "z" and len(names) != 2 + len(u):
        raise TypeError(f"{step.__name__} takes {', '.join(names)}: pass all but z, "
                        f"got {1 + len(u)}")
    if row.ndim > 1:
        raise ValueError("parameters must be numbers, those of one step")
    if not draws(step, row):
        raise ValueError(f"{step.__name__} adds no noise here, so it has no density")
    *of_operands, std = map(float, row)
    for name, v in zip(("x_next", *names[1:]), (x_next, *u)):
        require_shape(x, v, name)
    mean = sum(c * v for c, v in zip(of_operands, (x, *u)))
    size = prod(x.shape[1:])
    z = ((x_next - mean) / std).reshape(-1, size)
    return -half_square(z) - size * np.log(std * (2 * np.pi)**.5)


def kl_of_normals(difference, variance, other):
    """KL(N(m, v I) || N(m', v' I)) in nats, (B,): m - m' (B, D), v and v' numbers.

        D / 2 (v / v' - 1 - log(v / v')) + |m - m'|^2 / (2 v')

    Example:
        >>> print(kl_of_normals(np.array([[3., 4.]]), 1., 1.))
        [12.5]
    """
    ratio = variance / other
    of_spread = .5 * difference.shape[-1] * (ratio - 1 - np.log(ratio))
    return of_spread + half_square(difference) / other


def variational_bound(score, x, betas, engine, variances=None):
    """DDPM's bound of -log p(x), in nats: its terms, (N + 1, B), which add up to it.
    [DDPM eq. 5; iDDPM sec. 2.1]

        -log p(x_0) <= E [-log p(x_0 | x_1)                     how well the last step ends
                          + sum_i KL(q(x_{i-1} | x_i, x_0) || p(x_{i-1} | x_i))
                          + KL(q(x_N | x_0) || N(0, I))]        what the prior misses

    p is the chain of `samplers.ancestral` with noise in its last step too, not the flow.
    Terms 0 ... N-1 are estimates, of one draw of x_i each; the last is exact. All normals
    have a multiple of I as their covariance, so each KL is `kl_of_normals`.

    How near the bound comes depends on N and on the variances: with beta_i, the default, it
    tends to -log p as the steps become many; with `ddpm.posterior_variances`, for a single
    point the right ones, some gap is left for data that are spread. Their beta~_0 is 0;
    index 0 takes index 1's, as in iDDPM.

    score(x, i): of arrays (B, D), as in `samplers.ancestral`; betas, variances: (N,);
    engine: a `samplers.Reference`, which draws x_i.

    Example:
        >>> from minidiff.samplers import Reference
        >>> x = np.ones((5000, 1))
        >>> score = lambda x, i: -x  # data N(0, 1)
        >>> terms = variational_bound(score, x, ddpm.linear_betas(), Reference(seed=0))
        >>> print(terms.sum(0).mean().round(1))  # 1/2 + log(2 pi) / 2
        1.4
    """
    betas = schedule(betas, "betas")
    alpha_bar = ddpm.alpha_bars(betas)
    alpha_bar_prev = ddpm.previous(alpha_bar)
    posterior = ddpm.posterior_variances(betas)
    variances = schedule(betas if variances is None else variances, "variances").copy()
    require_shape(betas, variances, "variances")
    if variances[0] == 0. and len(betas) > 1:
        variances[0] = variances[1]
    if not (variances > 0).all():
        raise ValueError("variances must be positive, but for the first of several")
    x = points(x)
    a, sigma = ddpm.marginal(alpha_bar)
    noised = engine(perturb, PERTURBATION, range(len(betas)), a=a, sigma=sigma)
    terms = []
    for i, (beta, variance) in enumerate(zip(betas, variances)):
        x_i = noised(i, x)
        s = require_shape(x, score(x_i, i))
        if i == 0:
            terms.append(-step_log_density(ddpm.ancestral_step, x, x_i, s,
                                           beta=beta, variance=variance))
            continue
        p_mean = ddpm.ancestral_step(x_i, s, 0., beta, variance)
        q_mean = ddpm.posterior_step(x_i, x, 0., alpha_bar[i], alpha_bar_prev[i], 0.)
        terms.append(kl_of_normals(q_mean - p_mean, posterior[i], variance))
    terms.append(kl_of_normals(a[-1] * x, sigma[-1]**2, 1.))
    return np.stack(terms)


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
