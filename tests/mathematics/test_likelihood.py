"""Likelihood by the probability-flow ODE against the density that is known exactly."""

import numpy as np
import pytest

from minidiff import chunks, data, ddpm, noise
from minidiff.data import dequantized
from minidiff.demo import bound, likelihood
from minidiff.likelihood import (
    bits_per_dim,
    dequantize,
    log_likelihood,
    variational_bound,
    with_trace,
)
from minidiff.net import ScoreNet
from minidiff.samplers import Reference, pf_ode_adaptive
from minidiff.sde import EDM, VE, VP, FlowMatching, SubVP, prior_std
from minidiff.targets import Gaussian, Mixture

SDES = pytest.mark.parametrize("sde", [VE(), VP(), SubVP(), EDM(), FlowMatching()],
                               ids=lambda sde: type(sde).__name__)
DIMENSIONS = pytest.mark.parametrize("d", [2, 10])


def target(d):
    return Mixture([1, 4], np.outer([-1, 1], np.ones(d)), [.3, .5])


def exact(p, sde):
    """(x, t) -> (s, trace) of the noised target."""
    return lambda x, t: (p.noised(*sde.marginal(t)).score(x),
                         p.noised(*sde.marginal(t)).jacobian_trace(x))


def linearized(p, sde):
    """(x, t) -> (s, vjp) by central differences of a symmetric Jacobian, one call a product:
    the error of h = 1e-5 is h^2 |s'''| / 6 and eps |s| / h, below 1e-9 for the targets here."""
    calls = []

    def linearize(x, t):
        q = p.noised(*sde.marginal(t))

        def vjp(v):
            calls.append(t)
            return (q.score(x + 1e-5 * v) - q.score(x - 1e-5 * v)) / 2e-5
        return q.score(x), vjp
    return linearize, calls


@SDES
@DIMENSIONS
def test_log_likelihood_is_the_log_density(sde, d):
    # tolerances of 1e-8 a step, some 300 steps: 3e-6 at most; measured 5e-7
    p = target(d)
    x = p.sample(64, seed=1)
    prior = p.noised(*sde.marginal(sde.T)).log_density
    log_p, _, _ = log_likelihood(exact(p, sde), x, sde, prior, rtol=1e-8, atol=1e-8)
    assert np.abs(log_p - p.noised(*sde.marginal(1e-5)).log_density(x)).max() < 1e-5


@SDES
def test_a_normal_prior_costs_what_the_data_still_shows_at_t_1(sde):
    """To first order log p_T / N is a mean . x_T / sigma^2, the mean 3/5 of the modes', and the gap
    its modulus: a |mean| / sigma (2 / pi)^(1/2) nats on average, for VP 4e-3 with modes at +-1 and
    2e-2 at +-5. 2^12 points give it to .6 / 2^6 of itself, 4.9 times; the next order is a tenth.
    """
    (a, sigma), normal = sde.marginal(sde.T), Gaussian([0., 0.], prior_std(sde)**2).log_density
    for m in (1, 5):
        p = Mixture([1, 4], np.outer([-m, m], np.ones(2)), [.3, .5])
        x, q = p.sample(2**12, seed=1), p.noised(a, sigma)
        ours, *_ = log_likelihood(exact(p, sde), x, sde, q.log_density)
        theirs, *_ = log_likelihood(exact(p, sde), x, sde, normal)
        gap = a * .6 * m * 2**.5 / sigma * (2 / np.pi)**.5
        assert np.abs(theirs - ours).mean() == pytest.approx(gap, rel=.15)
        assert sde != VP() or float(f"{gap:.0e}") == {1: 4e-3, 5: 2e-2}[m]


def test_a_gaussian_in_eight_dimensions_costs_44_evaluations_and_8e_5_nats():
    """A draw's error is quadratic in it, so its mean over draws moves: 7.2e-5 over 2^12 draws,
    8e-5 (+- 1.6e-5) over the first twenty, each integrated alone; the largest with their number.
    """
    p, sde, errors = Gaussian(np.zeros(8), .25), VP(), []
    for x in (*p.sample(20, seed=3)[:, None], p.sample(2**12, seed=3)):
        log_p, _, evaluations = log_likelihood(exact(p, sde), x, sde,
                                               Gaussian(np.zeros(8), 1.).log_density)
        assert evaluations == 44
        errors.append(abs(log_p - p.noised(*sde.marginal(1e-5)).log_density(x)).mean())
    assert round(np.mean(errors[:20]), 5) == 8e-5
    assert round(errors[20], 6) == 7.2e-5


@pytest.mark.parametrize("sde", [VE(), VP(), SubVP(), FlowMatching()],
                         ids=lambda sde: type(sde).__name__)
def test_a_density_of_one_dimension_integrates_to_one(sde):
    p, x = Mixture([.3, .7], [[-1.], [1.5]], [.1, .3]), np.linspace(-6, 6, 1201)[:, None]
    log_p, _, _ = log_likelihood(exact(p, sde), x, sde,
                                 Gaussian([0.], prior_std(sde)**2).log_density)
    assert np.exp(log_p).sum() * .01 == pytest.approx(1, abs=1e-4)


def test_the_exact_trace_is_that_of_the_jacobian_by_d_products():
    p = target(3)
    linearize, calls = linearized(p, VP())
    x = p.sample(5, seed=2)
    s, trace = with_trace(linearize, np.eye(3))(x, .3)
    want = exact(p, VP())(x, .3)
    np.testing.assert_array_equal(s, want[0])
    np.testing.assert_allclose(trace, want[1], rtol=0, atol=1e-8)
    assert len(calls) == 3


@pytest.mark.parametrize("probe", [noise.rademacher, noise.normal])
def test_hutchinsons_mean_is_the_exact_likelihood_within_its_standard_error(probe):
    """2^12 probes of one point, each its own trajectory; alpha 1e-6. The probe is one for a
    trajectory and costs one product an evaluation."""
    p, sde, n = target(4), VP(), 2**12
    x = np.repeat(p.sample(1, seed=4), n, 0)
    prior = p.noised(*sde.marginal(sde.T)).log_density
    linearize, calls = linearized(p, sde)
    v = probe(x.shape, seed=5, tag=noise.PROBE).astype(np.float64)
    log_p, _, evaluations = log_likelihood(with_trace(linearize, [v]), x, sde, prior)
    want, _, _ = log_likelihood(exact(p, sde), x[:1], sde, prior)
    assert len(calls) == evaluations
    assert abs(log_p.mean() - want[0]) < 4.9 * log_p.std() / n**.5 + 1e-4  # and of RK45
    assert log_p.std() > .05


@SDES
def test_the_adaptive_sampler_undoes_the_flow_that_measured_the_likelihood(sde):
    # two integrations at 1e-8, the one back contracting or spreading by at most the prior's scale
    p = target(2)
    x = p.sample(16, seed=6)
    _, x_T, _ = log_likelihood(exact(p, sde), x, sde, lambda x: 0 * x[:, 0], rtol=1e-8, atol=1e-8)
    score = lambda x, t: p.noised(*sde.marginal(t)).score(x)
    states = list(pf_ode_adaptive(score, x_T, sde, [sde.T, sde.T / 2, 1e-5], 1e-8, 1e-8))
    assert len(states) == 2 and states[0].shape == x.shape
    np.testing.assert_allclose(states[-1], x, rtol=0, atol=1e-5)


def test_the_adaptive_sampler_scales_a_gaussian_by_the_ratio_of_its_stds():
    p, sde = Gaussian(np.zeros(3), .25), VP()
    x = np.array([[1., -2., .3]])
    *_, end = pf_ode_adaptive(lambda x, t: p.noised(*sde.marginal(t)).score(x), x, sde, [1., 1e-5],
                              1e-9, 1e-9)
    stds = [p.noised(*sde.marginal(t)).variances[0]**.5 for t in (1e-5, 1.)]
    np.testing.assert_allclose(end, x * stds[0] / stds[1], rtol=1e-6)
    halfway, = pf_ode_adaptive(lambda x, t: p.noised(*sde.marginal(t)).score(x), x, sde, [.5, 1e-5],
                               1e-9, 1e-9)
    std = p.noised(*sde.marginal(.5)).variances[0]**.5
    np.testing.assert_allclose(halfway, x * stds[0] / std, rtol=1e-6)


@pytest.mark.parametrize("d", [2, 10])
def test_the_adaptive_sampler_reaches_the_modes(d):
    """2^14 samples: weight within 4.9 standard errors, mean and variance of the modes too; RK45
    at 1e-5 adds nothing that shows."""
    p, sde, n = target(d), VP(), 2**14
    x = p.noised(*sde.marginal(1.)).sample(n, seed=7)
    *_, x = pf_ode_adaptive(lambda x, t: p.noised(*sde.marginal(t)).score(x), x, sde, [1., 1e-5])
    q, moment = p.sample(n, seed=8), (lambda x: (x.sum(1) < 0, x.mean(1), x[:, 0]**2))
    for one, other in zip(moment(x), moment(q)):
        assert abs(one.mean() - other.mean()) < 4.9 * (2 / n)**.5 * other.std()


def test_bits_per_dim_of_what_is_known():
    # a uniform density on [-1, 1]^D: log2 L bits for L grey levels, each 2 / L wide
    for levels in (17, 256):
        log_p = np.full(3, -4 * np.log(2.))
        np.testing.assert_allclose(bits_per_dim(log_p, 4, levels), np.log2(levels), rtol=1e-15)
    assert bits_per_dim(0., 4, 256) == 7
    assert bits_per_dim(-np.log(2.) * 4, 4) == 1  # of a density itself, no levels


def test_dequantised_levels_fill_the_interval_and_keep_their_level():
    k, u = np.arange(17.), np.linspace(0, 1, 5, endpoint=False)[:, None]
    x = dequantize(k, u, 17)
    assert x.min() == -1 and x.max() < 1
    np.testing.assert_array_equal(np.floor((x + 1) / 2 * 17 + 1e-9), np.broadcast_to(k, x.shape))


def test_dequantised_likelihood_bounds_that_of_the_levels():
    """Jensen: the mean over u of bits/dim is at least -log2 of the level's probability, and so
    it is within the density's change over a level, here small."""
    p, levels = Gaussian([.1], .2), 64
    k, u = np.arange(levels), (np.arange(64) + .5) / 64
    x = dequantize(k[:, None], u, levels)
    bound = bits_per_dim(p.log_density(x[..., None]), 1, levels).mean(1)
    exact_p = np.exp(p.log_density(x[..., None])).mean(1) * 2 / levels
    gap = bound + np.log2(exact_p)
    assert (gap > 0).all() and gap.max() < 1e-2


@pytest.mark.parametrize("s, trace, prior, named", [
    (np.ones((3, 1)), np.ones(3), np.zeros(3), "score"), (1., np.ones(3), np.zeros(3), "score"),
    (np.ones((3, 2)), np.ones((3, 1)), np.zeros(3), "trace"),
    (np.ones((3, 2)), 1., np.zeros(3), "trace"),
    (np.ones((3, 2)), np.ones(3), np.zeros((3, 1)), "prior")])
def test_results_of_another_shape_are_refused(s, trace, prior, named):
    with pytest.raises(ValueError, match=f"{named} has shape"):
        log_likelihood(lambda x, t: (s, trace), [[1., 2.]] * 3, VP(), lambda x: prior)


def test_a_product_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"product has shape \(1, 2\), not \(3, 2\)"):
        with_trace(lambda x, t: (x, lambda v: v[:1]), np.eye(2))(np.ones((3, 2)), .5)


def test_dequantised_data_are_uniform_within_their_level_and_fresh_each_step():
    k = np.arange(2**14).reshape(2**12, 4) % 17
    u = [(dequantized((k / 8 - 1).astype(np.float32), 17, 3, step) + 1) * 17 / 2 - k
         for step in (0, 1)]
    for v in u:  # P(sup |F_n - F| > d) <= 2 exp(-2 n d^2) = 1e-6; 1e-5 of rounding
        gap = np.abs(np.sort(v.ravel()) - (np.arange(v.size) + .5) / v.size)
        assert gap.max() < (np.log(2e6) / 2**15)**.5 + 1e-4
    assert abs(np.corrcoef(u[0].ravel(), u[1].ravel())[0, 1]) < 4.9 / 2**7
    assert dequantized(k, None) is k


@pytest.mark.parametrize("shape, kw", [
    ((3,), {}), ((2, 3), {"t_min": 2.}), ((2, 3), {"t_min": 1.}), ((2, 3), {"t_min": -1.}),
    ((2, 3), {"rtol": 0.}), ((2, 3), {"atol": -1.})], ids=str)
def test_arguments_out_of_range(shape, kw):
    x = np.ones(shape)
    with pytest.raises(ValueError, match="x must|t_min|t must|rtol|atol"):
        log_likelihood(lambda x, t: (x, x[:, 0]), x, VP(), lambda x: x[:, 0], **kw)


def test_bits_per_dim_of_digits_under_a_gaussian_network():
    """A network that starts at F = 0 is the exact score of N(0, 1/4 I); its flow only stretches,
    and a Rademacher probe gives the trace of a multiple of I exactly: bits/dim in closed form.
    RK45 at 1e-5 keeps the integral, some 200 nats in 64 dimensions, to some 1e-3 bits."""
    digits, sde = data.load("digits"), VP()
    mean, error, _ = likelihood(ScoreNet((1, 8, 8)).requires_grad_(False), digits, 32, 3)
    x = dequantized(digits.held[:32], 17, 3).reshape(32, 64).astype(float)
    (a, sigma), (a_T, sigma_T) = sde.marginal(1e-5), sde.marginal(1.)
    stretch = ((a_T**2 / 4 + sigma_T**2) / (a**2 / 4 + sigma**2))**.5
    log_p = Gaussian(np.zeros(64), 1.).log_density(stretch * x) + 64 * np.log(stretch)
    bits = -log_p / np.log(2) / 64 + np.log2(17 / 2)  # the grey levels are 2 / 17 apart
    assert mean == pytest.approx(bits.mean(), abs=1e-3)
    assert error == pytest.approx(bits.std(ddof=1) / 32**.5, rel=1e-3)


def test_the_bound_of_digits_under_a_gaussian_network(monkeypatch):
    """The same network's chain, beside NumPy's on the exact score and the same noise: float32
    scores, of which 1,000 steps add up some 1e-4 bits."""
    monkeypatch.setattr(chunks, "IMAGES", 16)
    digits, betas = data.load("digits"), ddpm.linear_betas()
    mean, error, evaluations = bound(ScoreNet((1, 8, 8)).requires_grad_(False), digits, 16, 3)
    x = dequantized(digits.held[:16], 17, 3).reshape(16, 64)
    alpha_bar = ddpm.alpha_bars(betas)
    terms = variational_bound(lambda x, i: -x / (alpha_bar[i] / 4 + 1 - alpha_bar[i]), x, betas,
                              Reference(3))
    bits = bits_per_dim(-terms.sum(0), 64, 17)
    assert evaluations == 1000
    assert mean == pytest.approx(bits.mean(), abs=1e-3)
    assert error == pytest.approx(bits.std(ddof=1) / 4, rel=1e-3)
