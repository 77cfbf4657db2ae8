"""A sampler's exact law, carried through the very loop that users run. No Monte Carlo.

A sampler is a loop that asks an engine to move its state:

    for k in steps:
        x = engine(step, tag, **parameters)(k, x, score(x, level))

minidiff's own are `samplers.Reference`, which draws the noise in NumPy, and
`kernels.Fused`, which draws it in a kernel. The loops do not care what x is. So a test may
hand them an engine whose state is not a sample but the *law* of a sample, and read off at the
end what infinitely many samples would have shown: weights, means, variances, distribution
functions, to rounding. Such a number is a fact about the loop, so it can be compared to
five digits, and a wrong coefficient, a wrong time or a step too few changes it. There
are two such engines.

**variances**, which the tour draws with (minidiff.tour): data N(0, v). The exact score is
linear, s = k x, hence each step is an affine map x' = a x + b s + c z, and the variance after
it is

    v' = (a + b k)^2 v + c^2.

The loop's state is the number v and its score returns the slope k of the level, not k x:

    slope = lambda v, i: -1 / (alpha_bar[i] * data + 1 - alpha_bar[i])
    *_, v = samplers.ancestral(slope, 1., betas, variances)

**Law**: any data whose score, along a unit vector u, depends on x @ u alone. A mixture of
two normals of one variance is such a one across its modes and along them. The state is a
set of nodes on the line of u, with weights. A step without noise moves each node. A step
with noise of std c puts a normal of std c in the place of each node, and adds these up over
an even grid of new nodes. A normal is so smooth that a sum over points c / 1.5 apart is its
integral to 5e-20, so nothing is lost but rounding. `law` runs a loop so and returns nodes
and weights:

    t, w = law(u, samplers.ddim, score, start, (alpha_bar,))
    mean, variance, _ = moments(t, w)
    w[t < 0].sum()                  # the weight of the mode on the left

Samples are then held to the law by `excess`. For a right sampler it is below 0, but for one
run in a million; that holds for any law and any number of samples:

    assert excess(x @ u, t, w) < 0

What it cannot do: steps that act on several coordinates at once. A corrector that measures
norms has no law on a line, and neither has a clip of coordinates unless the data have but
one. The tests give those bounds of another kind (tests/mathematics/test_samplers.py).
"""

import numpy as np
from scipy.stats import norm

from minidiff import samplers
from minidiff.engine import Engine


class Law(Engine):
    """An engine whose state is nodes x on the line of u; `w` are their weights.

    The grid's spacing is c / 1.5 at most, so sums over it are integrals to
    exp(-2 (1.5 pi)^2) = 5e-20.
    """

    at = [samplers.Reference(normal=lambda shape, *_, z=z: np.full(shape, z))
          for z in (0., 1.)]

    def __init__(self, u, w):
        super().__init__()
        self.u, self.w = u, w

    def __call__(self, *step, **parameters):
        """The step as a move of nodes, made of its moves with z = 0 and z = 1."""
        moves = [engine(*step, **parameters) for engine in self.at]
        return lambda *x: self.spread(*(move(*x) for move in moves))

    def corrector(self, *step, **parameters):
        """Corrections likewise; they would write into x."""
        corrections = [engine.corrector(*step, **parameters) for engine in self.at]
        return lambda k, x, s: self.spread(*(one(k, x.copy(), s) for one in corrections))

    def spread(self, mean, mean_plus_std):
        """The nodes after a step to mean + std z; `w` becomes their weights."""
        c = (mean_plus_std - mean).flat[0]
        if c == 0:
            return mean
        kept = self.w > 1e-16
        m = (mean @ self.u)[kept, None]
        w = self.w[kept, None]
        low = m.min() - 8 * c
        high = m.max() + 8 * c
        h = min(c / 1.5, (high - low) / 1000)
        first = np.ceil((m - 8 * c - low) / h).astype(int)
        i = first + np.arange(int(16 * c / h))  # of each node, the places within 8 std
        kernel = np.exp(-((low + h * i - m) / c)**2 / 2) * (h / c / (2 * np.pi)**.5)
        self.w = np.bincount(i.ravel(), (w * kernel).ravel())
        return np.outer(low + h * np.arange(len(self.w)), self.u)


def law(u, loop, score, p, arguments):
    """(nodes, weights) of the law of x @ u at the end of a loop that starts from p.

    2,000 even nodes to 8 std beyond the modes, each with the mass that is nearest to it. A
    flow parts neighbours 1e10-fold, so it is run again from where its end nodes were even.
    """
    mean = p.means @ u
    std = p.variances[0, 0]**.5
    start = np.linspace(mean.min() - 8 * std, mean.max() + 8 * std, 2000)
    for _ in range(4):
        edges = norm.cdf((start[1:, None] + start[:-1, None]) / 2, mean, std) @ p.weights
        w = np.diff(edges, prepend=0., append=1.)
        engine = Law(u, w)
        *_, x = loop(score, np.outer(start, u), *arguments, engine)
        t = x @ u
        if engine.w is not w:
            break  # noise has spread it over even nodes
        start = np.interp(np.linspace(t[0], t[-1], len(t)), t, start)
    assert abs(engine.w.sum() - 1) < 1e-11 and (np.diff(t) >= 0).all()
    return t, engine.w


def moments(t, w):
    """Mean, variance v, and the variance of (t - mean)^2."""
    mean = np.average(t, weights=w)
    v = np.cov(t, aweights=w, ddof=0)
    return mean, v, np.average((t - mean)**4, weights=w) - v**2


def excess(x, t, w):
    """sup |F_n - F| less d, where P(sup > d) <= 2 exp(-2 n d^2) = 1e-6.

    [Dvoretzky-Kiefer-Wolfowitz]
    """
    of_samples = np.searchsorted(np.sort(x), t, "right") / len(x)
    of_law = np.cumsum(w) - w / 2
    d = (np.log(2 / 1e-6) / (2 * len(x)))**.5
    return abs(of_samples - of_law).max() - d


def linear_law(sample, D):
    """(mean (D,), covariance (D, D)) of the last state of a sampler that is linear in its noise.

    sample(z, engine) runs it from z (B, D), and returns its last state. Of a linear map the
    mean is its value where all noise is 0, and the covariance follows from its values at the
    unit vectors. So one batch tells both: in each row one number of one draw is 1. No score
    needs to lie on a line for that, as it does for `law`.
    """
    draws = []

    def noted(shape, k, tag):
        draws.append((k, tag))
        return np.zeros(shape)

    sample(np.zeros((1, D)), samplers.Reference(normal=noted))
    again = iter(range(len(draws)))

    def unit_vectors(shape, k, tag):
        draw = next(again)
        assert (k, tag) == draws[draw]
        first = 1 + D * (1 + draw)
        z = np.zeros(shape)
        z[first:first + D] = np.eye(D)
        return z

    start = np.zeros((1 + D * (1 + len(draws)), D))
    start[1:1 + D] = np.eye(D)
    x = sample(start, samplers.Reference(normal=unit_vectors))
    A = x[1:] - x[0]
    return x[0], A.T @ A
