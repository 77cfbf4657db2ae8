"""DDPM's bound and the density of a step, against closed forms of Gaussian data."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from minidiff import ddpm, guidance, langevin, noise, samplers, sde
from minidiff.likelihood import (
    bits_per_dim,
    kl_of_normals,
    log_likelihood,
    step_log_density,
    variational_bound,
)
from minidiff.samplers import Reference
from minidiff.sde import VP, prior_std
from minidiff.targets import Gaussian, Mixture

PLANE = Mixture([.3, .7], [[-1., .5], [1.5, -.5]], [.3, .5])


def betas_of(n):
    """DDPM's for n steps, as dense in time as its 1000."""
    return ddpm.linear_betas(n, .1 / n, 20 / n)


def score_of(data, betas):
    alpha_bar = ddpm.alpha_bars(betas)
    return lambda x, i: data.noised(alpha_bar[i]**.5, (1 - alpha_bar[i])**.5).score(x)


def exact_bound(v, betas, variances=None, mean=0.):
    """The mean over data N(mean, v) of the bound, no Monte Carlo: its terms are quadratic in x0
    and in the noise, so that x0 = mean +- sqrt(v) with z = +-1 give their means."""
    x = np.repeat([[mean + v**.5], [mean - v**.5]], 2, 0)
    z = np.array([[1.], [-1.], [1.], [-1.]])
    engine = Reference(normal=lambda shape, k, tag: z)
    data = Gaussian([mean], v)
    return variational_bound(score_of(data, betas), x, betas, engine, variances).mean(1)


def entropy(v):
    """The mean of -log p(x) over N(m, v)."""
    return .5 + .5 * np.log(2 * np.pi * v)


def joint_covariance(a, c, v):
    """Of x_0 ~ N(0, v) and x_{k+1} = a_k x_k + c_k z_k, in that order."""
    n = len(a) + 1
    maps = np.zeros((n, n))  # x = maps @ (x_0 / sqrt(v), z)
    maps[0, 0] = v**.5
    for k in range(n - 1):
        maps[k + 1] = a[k] * maps[k]
        maps[k + 1, k + 1] = c[k]
    return maps @ maps.T


@pytest.mark.parametrize("posterior", [False, True], ids=["beta", "beta~"])
@pytest.mark.parametrize("v", [.25, 1., 2.])
def test_the_bound_is_the_divergence_of_two_whole_chains(v, posterior):
    """The bound's own excess over the entropy is KL(q(x_0 ... x_N) || p(x_0 ... x_N)), of two
    normals of N + 1 dimensions: one determinant and one trace, and no term of the bound."""
    betas = np.array([.02, .1, .3, .25, .6])
    variances = ddpm.posterior_variances(betas) if posterior else betas.copy()
    if posterior:
        variances[0] = variances[1]  # as iDDPM has it
    q = joint_covariance((1 - betas)**.5, betas**.5, v)
    alpha_bar = ddpm.alpha_bars(betas)
    slope = -1 / (alpha_bar * v + 1 - alpha_bar)
    back = ((1 + betas * slope) / (1 - betas)**.5)[::-1]
    p = joint_covariance(back, variances[::-1]**.5, 1.)[::-1, ::-1]
    (_, log_q), (_, log_p) = np.linalg.slogdet(q), np.linalg.slogdet(p)
    kl = .5 * (np.trace(np.linalg.solve(p, q)) - len(q) + log_p - log_q)
    given = ddpm.posterior_variances(betas) if posterior else None
    found = exact_bound(v, betas, given).sum()
    # of two 6 by 6 matrices with condition numbers below 1e4
    assert found - entropy(v) == pytest.approx(kl, abs=1e-11)
    assert kl > .01 or v == 1 and not posterior  # whose way back is exact


@pytest.mark.parametrize("n, gap, of_posterior", [
    (1000, 1.092e-3, .5699), (4000, 2.730e-4, .4873), (64000, 1.706e-5, .4469)])
def test_with_beta_the_bound_tends_to_the_density_with_the_posteriors_it_does_not(
        n, gap, of_posterior):
    """Data N(0, 1/4), nats a dimension. The gap of beta falls as 1 / N."""
    betas = ddpm.linear_betas() if n == 1000 else betas_of(n)
    found = exact_bound(.25, betas).sum() - entropy(.25)
    assert found == pytest.approx(gap, rel=1e-3)
    variances = ddpm.posterior_variances(betas)
    found = exact_bound(.25, betas, variances).sum() - entropy(.25)
    assert found == pytest.approx(of_posterior, rel=1e-3)


def test_the_gap_of_beta_halves_with_twice_the_steps():
    gaps = [exact_bound(.25, betas_of(n)).sum() - entropy(.25) for n in (500, 1000, 2000, 4000)]
    slope = -np.polyfit(np.log([500, 1000, 2000, 4000]), np.log(gaps), 1)[0]
    assert slope == pytest.approx(1, abs=.06)


@pytest.mark.parametrize("v", [.01, .25, 1., 4.])
@pytest.mark.parametrize("mean", [0., 1.5])
@pytest.mark.parametrize("n", [1, 2, 10, 1000])
def test_the_bound_is_never_below_the_density(v, mean, n):
    betas = ddpm.linear_betas(n, 1e-4, .02)
    kinds = [None, ddpm.posterior_variances(betas)] if n > 1 else [None]
    for variances in kinds:
        terms = exact_bound(v, betas, variances, mean)
        assert terms.shape == (n + 1,)
        assert (terms[1:] > -1e-15).all()  # divergences
        # at v = 1 and variance beta they are equal: rounding of 1,000 terms that add up to 3
        assert terms.sum() >= entropy(v) - 1e-12


def test_the_last_term_is_what_the_prior_misses():
    betas = ddpm.linear_betas()
    a2 = ddpm.alpha_bars(betas)[-1]
    *_, last = exact_bound(.25, betas, mean=1.)
    variance = 1 - a2
    by_hand = .5 * (variance + a2 * 1.25 - 1 - np.log(variance))
    assert last == pytest.approx(by_hand, rel=1e-10)


def test_on_a_mixture_the_bound_is_just_above_the_flows_exact_likelihood():
    """2,048 points: the mean difference within 4.9 of its own standard error above 0, and the
    gap of 1,000 steps, some 1e-3 nats a dimension, of 0."""
    betas, n = ddpm.linear_betas(), 2048
    x = PLANE.sample(n, seed=1)
    terms = variational_bound(score_of(PLANE, betas), x, betas, Reference(seed=2))
    vp = VP()

    def exact(x, t):
        noised = PLANE.noised(*vp.marginal(t))
        return noised.score(x), noised.jacobian_trace(x)
    prior = Gaussian(np.zeros(2), prior_std(vp)**2).log_density
    log_p, *_ = log_likelihood(exact, x, vp, prior)
    over = terms.sum(0) + log_p
    error = 4.9 * over.std() / n**.5
    assert -error < over.mean() < error + .02
    assert bits_per_dim(-terms.sum(0), 2).mean() == pytest.approx(
        bits_per_dim(log_p, 2).mean(), abs=error)


def test_each_sample_follows_from_its_own_seed_and_id():
    betas = ddpm.linear_betas(20)
    x = PLANE.sample(6, seed=1)
    score = score_of(PLANE, betas)
    whole = variational_bound(score, x, betas, Reference(seed=3))
    part = variational_bound(score, x[4:], betas, Reference(seed=3, sample=4))
    np.testing.assert_array_equal(whole[:, 4:], part)


@pytest.mark.parametrize("bad, message", [
    ({"x": np.ones(3)}, r"x must be \(B, D\), got \(3,\)"),
    ({"betas": [.1, 1.2]}, "beta must be in"), ({"betas": []}, "betas must be finite"),
    ({"variances": [.1]}, r"variances has shape \(1,\), not \(2,\)"),
    ({"variances": [.1, 0.]}, "variances must be positive"),
    ({"variances": [-1., .1]}, "variances must be positive"),
    ({"variances": [np.nan, .1]}, "variances must be finite"),
    ({"variances": [np.inf, .1]}, "variances must be finite"),
    ({"betas": [.1], "variances": [0.]}, "variances must be positive"),
    ({"score": lambda x, i: x[:1]}, r"score has shape \(1, 2\), not \(3, 2\)")], ids=str)
def test_arguments_that_no_bound_has(bad, message):
    given = {"score": lambda x, i: -x, "x": np.ones((3, 2)), "betas": [.1, .2],
             "engine": Reference()} | bad
    with pytest.raises(ValueError, match=message):
        variational_bound(**given)


def test_an_engine_draws_its_noise_once():
    engine = Reference()
    arguments = lambda x, i: -x, np.ones((3, 2)), [.1, .2], engine
    variational_bound(*arguments)
    with pytest.raises(ValueError, match="this engine has drawn PERTURBATION steps 0"):
        variational_bound(*arguments)


# ---- the density of a step ----

STEPS = [
    (langevin.langevin_step, 1, {"eps": .3}),
    (ddpm.forward_step, 0, {"beta": .3}),
    (ddpm.ancestral_step, 1, {"beta": .3, "variance": .2}),
    (ddpm.ddim_step, 1, {"alpha_bar": .3, "alpha_bar_prev": .6, "eta": .5}),
    (ddpm.posterior_step, 1, {"alpha_bar": .3, "alpha_bar_prev": .6, "variance": .1}),
    (sde.reverse_sde_step, 1, {"sde": VP(), "t": .5, "dt": .1}),
    (sde.ancestral_step, 1, {"sde": sde.VE(), "i": 3, "n": 10}),
    (guidance.guided_reverse_sde_step, 2, {"w": 2., "sde": VP(), "t": .5, "dt": .1}),
]


@pytest.mark.parametrize("step, others, p", STEPS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_steps_density_is_the_normal_about_its_mean(step, others, p):
    """SciPy's density of N(mean, c^2), where mean and c are the step at z = 0 and z = 1."""
    x, *u = np.random.default_rng(1).standard_normal((1 + others, 5, 3))
    z = noise.normal((5, 3), seed=2).astype(float)
    x_next = step(x, *u, z, **p)
    mean = step(x, *u, 0., **p)
    std = step(0., *[0.] * others, 1., **p)
    want = norm.logpdf(x_next, mean, std).sum(1)
    got = step_log_density(step, x_next, x, *u, **p)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_its_gradient_is_what_reinforcement_learning_follows():
    """d log p / ds = z b / c, b and c the step's coefficients of s and z; in torch, of float32."""
    rng = np.random.default_rng(1)
    x, s, z = (torch.tensor(u, dtype=torch.float32) for u in rng.standard_normal((3, 4, 2)))
    p = {"beta": .3, "variance": .2}
    x_next = ddpm.ancestral_step(x, s, z, **p)
    leaf = s.clone().requires_grad_()
    log_p = step_log_density(ddpm.ancestral_step, x_next, x, leaf, **p)
    assert log_p.dtype == torch.float32 and log_p.shape == (4,)
    log_p.sum().backward()
    # x' - mean cancels to c z: eps |x'| / c of z
    torch.testing.assert_close(leaf.grad, z * .3 / .7**.5 / .2**.5, rtol=0, atol=1e-5)


def test_of_a_samplers_states_it_finds_the_noise_that_was_drawn():
    betas = ddpm.linear_betas(10)
    score = score_of(PLANE, betas)
    x = noise.normal((6, 2), seed=1).astype(float)
    states = samplers.ancestral(score, x, betas, Reference(seed=4), last_noise=True)
    for k, x_next in enumerate(states):
        i = 9 - k
        got = step_log_density(ddpm.ancestral_step, x_next, x, score(x, i),
                               beta=betas[i], variance=betas[i])
        z = noise.normal((6, 2), 4, 0, k, noise.PREDICTOR).astype(float)
        want = norm.logpdf(z).sum(1) - 2 * np.log(betas[i]**.5)
        np.testing.assert_allclose(got, want, rtol=1e-9)
        x = x_next


@pytest.mark.parametrize("step, p, message", [
    (ddpm.ancestral_step, {"beta": .1, "variance": 0.}, "adds no noise here"),
    (ddpm.ddim_step, {"alpha_bar": .3, "alpha_bar_prev": .6, "eta": 0.}, "adds no noise here"),
    (sde.pf_ode_step, {"sde": VP(), "t": .5, "dt": .1}, "pf_ode_step adds no noise here"),
    (ddpm.ancestral_step, {"beta": np.array([.1, .2, .3]), "variance": .1}, "must be numbers"),
    (ddpm.ancestral_step, {"beta": 2., "variance": .1}, "beta must be in")])
def test_a_step_without_noise_has_no_density(step, p, message):
    x = np.ones((3, 2))
    with pytest.raises(ValueError, match=message):
        step_log_density(step, x, x, x, **p)


def test_operands_that_are_too_few_or_of_another_shape_are_refused():
    x, p = np.ones((3, 2)), {"beta": .1, "variance": .1}
    with pytest.raises(ValueError, match=r"x_next has shape \(2,\), not \(3, 2\)"):
        step_log_density(ddpm.ancestral_step, x[0], x, x, **p)
    with pytest.raises(ValueError, match=r"s has shape \(1, 2\), not \(3, 2\)"):
        step_log_density(ddpm.ancestral_step, x, x, x[:1], **p)
    with pytest.raises(TypeError, match="ancestral_step takes x, s, z: pass all but z, got 1"):
        step_log_density(ddpm.ancestral_step, x, x, **p)
    with pytest.raises(TypeError, match="pass all but z, got 3"):
        step_log_density(ddpm.ancestral_step, x, x, x, x, **p)


def test_of_an_image_it_is_of_all_its_numbers():
    """(B, C, H, W) and (B, D) are one; numbers alone, (B,), are samples of one number."""
    x, s, x_next = np.random.default_rng(1).standard_normal((3, 4, 2, 3, 5))
    p = {"beta": .3, "variance": .2}
    flat = [u.reshape(4, 30) for u in (x_next, x, s)]
    want = step_log_density(ddpm.ancestral_step, *flat, **p)
    got = step_log_density(ddpm.ancestral_step, x_next, x, s, **p)
    assert got.shape == (4,)
    np.testing.assert_allclose(got, want, rtol=1e-13)
    alone = step_log_density(ddpm.ancestral_step, x_next.ravel(), x.ravel(), s.ravel(), **p)
    np.testing.assert_allclose(alone.reshape(4, 30).sum(1), want, rtol=1e-13)


def test_the_divergence_of_two_normals():
    """By quadrature in one dimension; it is 0 of equal ones."""
    x = np.linspace(-12, 12, 4001)
    p, q = norm(.3, .5**.5), norm(1., 2.**.5)
    by_sum = (p.pdf(x) * (p.logpdf(x) - q.logpdf(x))).sum() * (x[1] - x[0])
    got = kl_of_normals(np.array([[-.7]]), .5, 2.)
    np.testing.assert_allclose(got, by_sum, rtol=1e-12)
    assert kl_of_normals(np.zeros((1, 3)), .7, .7) == 0
