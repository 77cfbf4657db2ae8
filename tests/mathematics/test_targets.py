"""The oracles checked against what defines them: integrals, derivatives and convolutions."""

import numpy as np
import pytest
from scipy.stats import norm

from minidiff.predictions import rescaled
from minidiff.targets import Gaussian, Mixture

GAUSSIAN = Gaussian([1., -2., .5], [.25, 3., 1.])
MIXTURE = Mixture([1, 4, 2], [[-1., 0., 1.], [1.5, -.5, 0.], [0., 1., -1.]], [.5, .8, 1.])
TARGETS = pytest.mark.parametrize("p", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
LINES = pytest.mark.parametrize("p", [
    Gaussian([.7], .3), Mixture([.2, .8], [[-1.], [1.5]], [.5, .1])], ids=["gaussian", "mixture"])
X = np.array([[0., 0., 0.], [1., -1., .5], [-2., 1., 2.], [.3, .2, -1.5]])


def derivative(f, x, axis, h=1e-3):
    """Central difference of fourth order: its error is h^4 |f^(5)| / 30 + 1.5 eps |f| / h.

    At X the components' scores lie within 7 of each other along an axis, most within 4, and
    |f^(5)| < 1e3; |f| < 24 and is right to 3 eps, eps = 1.1e-16. So the error is below
    3.4e-11 + 1.2e-11, and 1e-10 bounds it.
    """
    e = h * np.eye(x.shape[-1])[axis]
    return (8 * (f(x + e) - f(x - e)) - f(x + 2 * e) + f(x - 2 * e)) / (12 * h)


@LINES
def test_density_integrates_to_one(p):
    x = np.linspace(-12, 12, 2001)[:, None]  # trapezoid, exact to rounding on a Gaussian
    assert np.exp(p.log_density(x)).sum() * .012 == pytest.approx(1, abs=1e-13)


@TARGETS
def test_score_is_the_gradient_of_the_log_density(p):
    for axis in range(3):
        np.testing.assert_allclose(p.score(X)[:, axis], derivative(p.log_density, X, axis),
                                   rtol=0, atol=1e-10)


@TARGETS
def test_jacobian_trace_is_the_divergence_of_the_score(p):
    divergence = sum(derivative(lambda x, k=k: p.score(x)[:, k], X, k) for k in range(3))
    np.testing.assert_allclose(p.jacobian_trace(X), divergence, rtol=0, atol=3e-10)


@LINES
@pytest.mark.parametrize("a, sigma", [(1., .5), (.6, .8), (.01, 2.)])
def test_at_is_the_density_of_a_x0_plus_sigma_z(p, a, sigma):
    x0, x = np.linspace(-12, 12, 2001), np.array([[-2.], [0.], [.9], [3.]])
    kernel = np.exp(-(x - a * x0)**2 / (2 * sigma**2)) / (2 * np.pi * sigma**2)**.5
    convolution = kernel @ np.exp(p.log_density(x0[:, None])) * .012
    np.testing.assert_allclose(np.exp(p.noised(a, sigma).log_density(x)), convolution, rtol=1e-12)


@TARGETS
def test_at_composes(p):
    twice = p.noised(.9, .3).noised(.5, .7)  # a = .9 * .5, sigma^2 = (.5 * .3)^2 + .7^2
    once = p.noised(.45, (.15**2 + .49)**.5)
    np.testing.assert_allclose(twice.score(X), once.score(X), rtol=1e-12)


@TARGETS
def test_rescaled_turns_a_ve_score_into_that_of_any_a_and_sigma(p):
    for a, sigma in ((.6, .8), (.01, 1.)):
        score = rescaled(lambda x, level: p.noised(1., level).score(x), lambda level: level)
        np.testing.assert_allclose(score(X, (a, sigma)), p.noised(a, sigma).score(X), rtol=1e-12,
                                   atol=1e-15)  # the components' scores may cancel


def test_a_gaussian_has_the_density_score_and_trace_of_a_gaussian():
    mean, variance = np.array([1., -2., .5]), np.array([.25, 3., 1.])
    np.testing.assert_allclose(GAUSSIAN.log_density(X),
                               norm(mean, variance**.5).logpdf(X).sum(-1), rtol=1e-14)
    np.testing.assert_allclose(GAUSSIAN.score(X), (mean - X) / variance, rtol=1e-15)
    np.testing.assert_allclose(GAUSSIAN.jacobian_trace(X), -(1 / variance).sum(), rtol=1e-13)


def test_variances_a_component_or_an_axis_of_each():
    one, each = np.array([.5, .8, 1.])[:, None], MIXTURE.variances
    np.testing.assert_array_equal(each, one * np.ones(3))
    same = Mixture([1, 4, 2], MIXTURE.means, one * np.ones(3))
    np.testing.assert_array_equal(same.score(X), MIXTURE.score(X))


def test_far_from_every_mode_the_mixture_score_is_the_nearest_modes_own():
    x = np.array([[1e4, 0., 0.], [-1e4, 0., 0.]])  # every component underflows; none is lost
    assert np.isfinite(MIXTURE.log_density(x)).all()
    np.testing.assert_array_equal(MIXTURE._components(x)[2].sum(-1), 1)
    widest = (MIXTURE.means[2] - x) / MIXTURE.variances[2]
    np.testing.assert_allclose(MIXTURE.score(x), widest, rtol=1e-12)


@TARGETS
def test_any_leading_axes_give_the_same_numbers(p):
    grid = X.reshape(2, 2, 3)
    for f in (p.log_density, p.jacobian_trace):
        np.testing.assert_array_equal(f(grid), f(X).reshape(2, 2))
    np.testing.assert_array_equal(p.score(grid), p.score(X).reshape(2, 2, 3))


DIRECTIONS = pytest.mark.parametrize("u", [(1., 0., 0.), (0., 1., 0.), (1., 2., -1.)])
# Dvoretzky-Kiefer-Wolfowitz: P(sup |F_n - F| > d) <= 2 exp(-2 n d^2), whatever n and F
N, DISTANCE = 2**16, (np.log(2 / 1e-6) / 2**17)**.5


def distance(y, cdf):
    """The Kolmogorov-Smirnov distance of a sample from a distribution function."""
    f, ranks = cdf(np.sort(y)), np.arange(len(y) + 1) / len(y)
    return max((ranks[1:] - f).max(), (f - ranks[:-1]).max())


@DIRECTIONS
def test_gaussian_samples_have_its_projections(u):
    p, u = GAUSSIAN, np.array(u)
    assert distance(p.sample(N, seed=1) @ u,
                    norm(p.means[0] @ u, (p.variances[0] @ u**2)**.5).cdf) < DISTANCE


@DIRECTIONS
def test_mixture_samples_have_its_projections(u):
    p, u = MIXTURE, np.array(u)
    components = norm(p.means @ u, (p.variances @ u**2)**.5)
    assert distance(p.sample(N, seed=1) @ u,
                    lambda y: components.cdf(y[:, None]) @ p.weights) < DISTANCE


@TARGETS
def test_a_shard_draws_its_own_rows_of_the_sample(p):
    np.testing.assert_array_equal(p.sample(9, seed=3)[4:], p.sample(5, seed=3, sample=4))
    assert (p.sample(9, seed=3) != p.sample(9, seed=4)).all()


@pytest.mark.parametrize("bad", [0., -1., np.nan, [1., 0., 1.]])
def test_a_variance_that_is_not_positive_is_refused(bad):
    with pytest.raises(ValueError, match="variance"):
        Gaussian([0., 0., 0.], bad)
    with pytest.raises(ValueError, match="variances"):
        Mixture([1, 1, 1], np.zeros((3, 2)), bad)


def test_weights_are_normalised_and_must_be_positive_one_a_mean():
    np.testing.assert_allclose(Mixture([1, 4], [[0.], [1.]], 1.).weights, [.2, .8])
    for weights in ([1, 0], [1, -1], [1, np.nan]):
        with pytest.raises(ValueError, match="weights"):
            Mixture(weights, [[0.], [1.]], 1.)
    for weights, means in (([1, 1, 1], [[0.], [1.]]), ([1, 1], [0., 1.])):
        with pytest.raises(ValueError, match="weights must be"):
            Mixture(weights, means, 1.)


def test_points_of_another_dimension_are_refused():
    for x in (np.ones((3, 1)), np.ones(3), 1.):
        with pytest.raises(ValueError, match=r"x must be \(\.\.\., 2\)"):
            Gaussian([0., 0.], 1.).score(x)
