"""The identities that make score matching work, by quadrature: no Monte Carlo where none is
needed. A trapezoid sum of a smooth function that decays converges faster than any power of
its spacing; the spacings below leave only rounding: at most 5329 terms, of moduli adding to
about 2, each sum within 5329 * 1.1e-16 of it. Hence 1e-12 wherever a quadrature is compared."""

import numpy as np
import pytest

from minidiff import noise
from minidiff.score_matching import (
    denoising,
    explicit,
    implicit,
    posterior_mean,
    sliced,
    sliced_vr,
)
from minidiff.targets import Gaussian, Mixture

PLANE = Mixture([.3, .7], [[-1., .5], [1.5, -.5]], [.5, .8])
LINE = Mixture([.3, .7], [[-1.], [1.5]], [.5, .8])
SIGNS = [np.array([[i, j]]) for i in (-1., 1.) for j in (-1., 1.)]  # every Rademacher probe
A = np.array([[-1., .6], [-.2, -.5]])  # not symmetric: the gradient of no density
GRID = np.linspace(-9, 9, 73)


def affine(x):
    """s = A x + 1 and its Jacobian, (B, 2, 2)."""
    return x @ A.T + 1, np.broadcast_to(A, (len(x), 2, 2))


def bent(x):
    """s = tanh(A x) - x / 2 and its Jacobian."""
    h = np.tanh(x @ A.T)
    return h - x / 2, (1 - h**2)[..., None] * A - np.eye(2) / 2


MODELS = pytest.mark.parametrize("model", [affine, bent])


def expectation(objective, w, *arrays):
    """E[objective] under weights w: each row's own value, weighted."""
    return sum(w[i] * objective(*(u[i:i + 1] for u in arrays)) for i in range(len(w)))


def over_plane():
    """Nodes (B, 2) and weights (B,) of an expectation over PLANE."""
    x = np.stack(np.meshgrid(GRID, GRID), -1).reshape(-1, 2)
    return x, np.exp(PLANE.log_density(x)) * (GRID[1] - GRID[0])**2


def over_noised_line(a, sigma):
    """x~ = a x0 + sigma z, z and `weight` of an expectation over x0 ~ LINE, z ~ N(0, 1).

    denoising is a mean of w e^2 over B rows, so the quadrature's weights enter it as B w.
    """
    x0, z = (u.reshape(-1, 1) for u in np.meshgrid(GRID, GRID))
    w = np.exp(LINE.log_density(x0) - z[:, 0]**2 / 2) / (2 * np.pi)**.5 * (GRID[1] - GRID[0])**2
    return a * x0 + sigma * z, z, len(w) * w[:, None]


def jacobian_times(jacobian, v):
    return np.einsum("bij,bj->bi", jacobian, np.broadcast_to(v, jacobian.shape[:2]))


@MODELS
def test_explicit_minus_implicit_is_half_the_fisher_information_whatever_the_model(model):
    x, w = over_plane()
    score, (s, jacobian) = PLANE.score(x), model(x)
    gap = expectation(explicit, w, s, score) \
        - expectation(implicit, w, s, np.trace(jacobian, axis1=1, axis2=2))
    assert gap == pytest.approx(.5 * w @ (score**2).sum(-1), abs=1e-12)


def test_the_score_itself_has_no_explicit_loss_and_the_least_implicit_one():
    x, w = over_plane()
    s = PLANE.score(x)
    assert explicit(s, s) == 0
    assert expectation(implicit, w, s, PLANE.jacobian_trace(x)) \
        == pytest.approx(-.5 * w @ (s**2).sum(-1), abs=1e-12)


def test_each_objective_is_the_mean_over_its_rows():
    x = PLANE.sample(8)
    s, jacobian = bent(x)
    for objective, *arrays in ((explicit, s, x), (implicit, s, s[:, 0]), (sliced, s, x, s),
                               (sliced_vr, s, x, s), (lambda s, z: denoising(s, z, 2.), s, x)):
        assert objective(*arrays) \
            == pytest.approx(expectation(objective, np.full(8, 1 / 8), *arrays), rel=1e-14)


@MODELS
@pytest.mark.parametrize("objective", [sliced, sliced_vr])
def test_the_mean_over_all_rademacher_probes_is_the_implicit_objective(objective, model):
    s, jacobian = model(PLANE.sample(64))
    mean = np.mean([objective(s, v, jacobian_times(jacobian, v)) for v in SIGNS])
    assert mean == pytest.approx(implicit(s, np.trace(jacobian, axis1=1, axis2=2)), rel=1e-14)


@MODELS
@pytest.mark.parametrize("objective", [sliced, sliced_vr])
def test_the_mean_over_normal_probes_is_the_implicit_objective(objective, model):
    s, jacobian = model(PLANE.sample(64))
    nodes, w = np.polynomial.hermite_e.hermegauss(3)  # exact to degree 5; v enters as v^2
    mean = sum(w_i * w_j * objective(s, v, jacobian_times(jacobian, v))
               for v_i, w_i in zip(nodes, w) for v_j, w_j in zip(nodes, w)
               for v in [np.array([[v_i, v_j]])]) / (2 * np.pi)
    assert mean == pytest.approx(implicit(s, np.trace(jacobian, axis1=1, axis2=2)), rel=1e-13)


@pytest.mark.parametrize("probe, variance", [
    # Var[v.Av]: sum over i < j of (a_ij + a_ji)^2 for signs; 2 |(A + A')/2|^2 for normals
    (noise.rademacher, .4**2), (noise.normal, 2 * ((A + A.T) / 2)**2 @ np.ones(2) @ np.ones(2))])
def test_the_mean_of_hutchinson_probes_is_the_trace(probe, variance):
    n = 2**16
    v = probe((n, 2), seed=1, tag=noise.PROBE).astype(np.float64)
    # with a model that is 0 here the reduced form is v . (grad s) v alone; alpha = 1e-6: 4.89
    mean = sliced_vr(np.zeros((n, 2)), v, v @ A.T)
    assert abs(mean - np.trace(A)) < 4.89 * (variance / n)**.5


@MODELS
def test_probes_of_unit_norm_scale_the_plain_form_by_one_over_d(model):
    s, jacobian = model(PLANE.sample(64))
    unit = [v / 2**.5 for v in SIGNS]
    mean = np.mean([sliced(s, v, jacobian_times(jacobian, v)) for v in unit])
    assert mean == pytest.approx(implicit(s, np.trace(jacobian, axis1=1, axis2=2)) / 2, rel=1e-14)


def test_probes_of_unit_norm_move_the_minimiser_of_the_reduced_form():
    # data N(0, I), s = -c x: the trace is -2c, E|s|^2 = 2 c^2. The minimum over c of
    # -2c + c^2 is 1; with the trace halved, of -c + c^2, it is 1/2.
    x, w = over_plane()
    w = np.exp(Gaussian([0., 0.], 1.).log_density(x)) * (GRID[1] - GRID[0])**2
    x, w = x[w > 1e-18], w[w > 1e-18]  # the rest adds less than 1e-13

    def minimiser(v):
        u = np.broadcast_to(v, x.shape)
        low, middle, high = (expectation(sliced_vr, w, -c * x, u, -c * u) for c in (0., 1., 2.))
        return 1 + (low - high) / (2 * (low - 2 * middle + high))  # the parabola's vertex

    assert minimiser(SIGNS[0]) == pytest.approx(1, abs=1e-12)
    assert minimiser(SIGNS[0] / 2**.5) == pytest.approx(.5, abs=1e-12)


NOISE = pytest.mark.parametrize("a, sigma", [(1., .5), (.6, .8)])


@NOISE
def test_denoising_minus_explicit_on_the_noised_data_is_the_same_for_every_model(a, sigma):
    x, z, weight = over_noised_line(a, sigma)
    q, nodes = LINE.at(a, sigma), np.linspace(-15, 15, 301)[:, None]
    w, score = np.exp(q.log_density(nodes)) * .1, q.score(nodes)
    # E|z / sigma|^2 = 1 / sigma^2, less the Fisher information of q, halved
    constant = .5 * (1 / sigma**2 - w @ (score**2).sum(-1))
    for model in (np.tanh, lambda x: 1 - .3 * x, lambda x: np.sin(x) - x):
        gap = denoising(model(x), z, sigma, weight) \
            - expectation(explicit, w, model(nodes), score)
        assert gap == pytest.approx(constant, abs=1e-12)


@NOISE
def test_the_minimiser_of_denoising_is_the_score_of_the_noised_data(a, sigma):
    # in any direction h the loss rises by eps^2 E[h^2] / 2 exactly: no first-order term
    x, z, weight = over_noised_line(a, sigma)
    s = LINE.at(a, sigma).score(x)
    for h in (np.tanh(x), x, np.cos(3 * x), np.ones_like(x)):
        for eps in (.1, -.1):
            rise = denoising(s + eps * h, z, sigma, weight) - denoising(s, z, sigma, weight)
            assert rise == pytest.approx(.5 * eps**2 * (weight * h**2).mean(), abs=1e-12)


def test_weight_sigma_squared_makes_denoising_a_noise_prediction():
    x, z = PLANE.sample(16), noise.normal((16, 2)).astype(np.float64)
    assert denoising(x, z, .3, weight=.09) \
        == pytest.approx(.5 * ((.3 * x + z)**2).sum(-1).mean(), rel=1e-14)
    sigma = np.linspace(.1, 2, 16)[:, None]
    assert denoising(x, z, sigma, weight=sigma**2) \
        == pytest.approx(.5 * ((sigma * x + z)**2).sum(-1).mean(), rel=1e-14)


@NOISE
def test_posterior_mean_is_the_gaussian_one(a, sigma):
    p = Gaussian([1., -2.], [.25, 3.])
    x = np.array([[0., 0.], [3., -4.], [-20., 7.]])
    gain = a * p.variance / (a**2 * p.variance + sigma**2)
    np.testing.assert_allclose(posterior_mean(x, p.at(a, sigma).score(x), a, sigma),
                               p.mean + gain * (x - a * p.mean), rtol=1e-13)


@NOISE
def test_posterior_mean_is_the_mixture_one_by_quadrature(a, sigma):
    x0, x = np.linspace(-9, 9, 289), np.array([[-3.], [0.], [.4], [5.]])
    p = np.exp(LINE.log_density(x0[:, None]) - (x - a * x0)**2 / (2 * sigma**2))
    np.testing.assert_allclose(posterior_mean(x, LINE.at(a, sigma).score(x), a, sigma)[:, 0],
                               (p * x0).sum(-1) / p.sum(-1), rtol=1e-12)
