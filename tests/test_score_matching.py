"""The identities that make score matching work, by quadrature: no Monte Carlo where none is
needed. A trapezoid sum of a smooth decaying function converges faster than any power of its
spacing; here it is exact to rounding, so sums of O(1) terms are held to 1e-12."""

import numpy as np
import pytest

from minidiff import noise, score_matching
from minidiff.targets import Gaussian, Mixture

GRID = np.linspace(-9, 9, 145)
SIGNS = np.array([[i, j] for i in (-1., 1.) for j in (-1., 1.)])
PLANE = Mixture([.3, .7], [[-1., .5], [1.5, -.5]], [.5, .8])
LINE = Mixture([.3, .7], [[-1.], [1.5]], [.5, .8])
A = np.array([[-1., .6], [-.2, -.5]])  # not symmetric: no gradient of any density


def affine(x):
    """s = A x + 1 and its Jacobian, (B, 2, 2)."""
    return x @ A.T + 1, np.broadcast_to(A, (len(x), 2, 2))


def bent(x):
    """s = -x / 2 + tanh(A x) and its Jacobian."""
    h = np.tanh(x @ A.T)
    return h - x / 2, (1 - h**2)[..., None] * A - np.eye(2) / 2


def exact(x):
    """PLANE's score; its Jacobian by the mixture formula."""
    s_k, gamma = PLANE._components(x)[1], PLANE.responsibilities(x)
    s = PLANE.score(x)
    outer = np.einsum("bk,bki,bkj->bij", gamma, s_k, s_k) - s[:, :, None] * s[:, None, :]
    return s, outer - (gamma / PLANE.variances).sum(-1)[:, None, None] * np.eye(2)


MODELS = pytest.mark.parametrize("model", [affine, bent, exact])
POINTS = PLANE.sample(32)


def mean(objective, x, w, *arrays):
    """E_w[objective]: each point's own value, weighted."""
    return sum(w_i * objective(*(u[i:i + 1] for u in arrays)) for i, w_i in enumerate(w))


def plane_nodes(step=3):
    """Points and weights of E over PLANE."""
    g = GRID[::step]
    x = np.stack(np.meshgrid(g, g), -1).reshape(-1, 2)
    return x, np.exp(PLANE.log_density(x)) * (g[1] - g[0])**2


def noised_nodes(a, sigma):
    """x~ = a x0 + sigma z with its z and weights, over LINE x N(0, 1)."""
    x0, z = (u.reshape(-1, 1) for u in np.meshgrid(GRID, GRID))
    w = np.exp(LINE.log_density(x0) - z[:, 0]**2 / 2) / (2 * np.pi)**.5 * (GRID[1] - GRID[0])**2
    return a * x0 + sigma * z, z, w


def denoising(s, z, sigma, w):
    """E_w of the objective: `weight` carries the quadrature's weights."""
    return score_matching.denoising(s, z, sigma, weight=len(w) * w[:, None])


def test_each_objective_is_the_mean_over_its_rows():
    s, jacobian = bent(POINTS)
    trace, data = np.trace(jacobian, axis1=1, axis2=2), PLANE.score(POINTS)
    w = np.full(32, 1 / 32)
    for objective, arrays in ((score_matching.explicit, (s, data)),
                              (score_matching.implicit, (s, trace)),
                              (score_matching.sliced, (s, POINTS, s)),
                              (score_matching.sliced_vr, (s, POINTS, s))):
        assert objective(*arrays) == pytest.approx(mean(objective, POINTS, w, *arrays), rel=1e-13)


@MODELS
def test_explicit_minus_implicit_is_half_the_data_fisher_information(model):
    for step in (2, 3):
        x, w = plane_nodes(step)
        s, jacobian = model(x)
        gap = mean(score_matching.explicit, x, w, s, PLANE.score(x)) \
            - mean(score_matching.implicit, x, w, s, np.trace(jacobian, axis1=1, axis2=2))
        print(model.__name__, step, gap, .5 * (w * (PLANE.score(x)**2).sum(-1)).sum(), w.sum())
