"""Diffusions and chains: their marginals, their limits and the coefficients of their steps."""

from decimal import Decimal, getcontext
from functools import partial

import numpy as np
import pytest
import torch

from minidiff import ddpm, kernels, langevin, samplers, solvers
from minidiff import sde as sdes
from minidiff.affine import coefficients, operands
from minidiff.sde import VE, VP, FlowMatching, SubVP

SDES = pytest.mark.parametrize("sde", [VE(), VP(), SubVP(), FlowMatching()],
                               ids=lambda s: type(s).__name__)
STEPS = 256, 512, 1024, 2048
LATEST = {FlowMatching(): .9}  # its f is 1,000 at T, where steps of 1 / 256 tell no order


def order(errors):
    """The order of convergence: the least-squares slope of ln error over ln (1 / STEPS)."""
    return -np.polyfit(np.log(STEPS), np.log(np.abs(errors)), 1)[0]


def moments(table, mean, variance):
    """Mean and variance after the steps x' = a x + c z of a table (N, 2)."""
    for a, c in table:
        mean, variance = a * mean, a**2 * variance + c**2
    return mean, variance


def betas_of_vp(n):
    """DDPM's betas for n steps: those of 1000 steps, as dense in time."""
    return ddpm.linear_betas(n, .1 / n, 20 / n)


# Marginals


@SDES
def test_the_marginal_solves_the_moment_equations(sde):
    # a' = f a and (sigma^2)' = 2 f sigma^2 + g^2 for f(x, t) = f x; fourth-order differences:
    # h^4 / 30 times a fifth derivative below 17^5 of VE's own size, and eps / h: below 1e-11
    t, h = np.linspace(.01, .99, 50), 2e-4

    def rate(moment):
        f = [moment(t + k * h) for k in (-2, -1, 1, 2)]
        return (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h)

    (a, sigma), f = sde.marginal(t), sde.drift(1., t)
    np.testing.assert_allclose(rate(lambda t: sde.marginal(t)[0]), f * a, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(rate(lambda t: sde.marginal(t)[1]**2),
                               2 * f * sigma**2 + sde.diffusion(t)**2, rtol=1e-9, atol=1e-11)


def test_the_vp_and_sub_vp_std_keeps_its_digits_at_small_times():
    getcontext().prec = 50
    t = 1e-5
    log_a2 = -Decimal(t)**2 * Decimal("9.95") - Decimal(t) * Decimal("0.1")
    variance = 1 - log_a2.exp()
    for sde, exact, naive_error in ((VP(), variance.sqrt(), .024), (SubVP(), variance, .047)):
        _, sigma = sde.marginal(t)
        assert abs(Decimal(float(sigma)) / exact - 1) < Decimal("1e-14")
        assert abs(Decimal(float(np.float32(sigma))) / exact - 1) < Decimal("1e-7")  # one rounding
        # 1 - a^2 in float32, as published codes have it, misses by per cents
        naive = np.float32(1) - np.exp(np.float32(2 * sde.log_a(t)))
        naive = naive**.5 if sde == VP() else naive
        assert abs(naive / float(exact) - 1) == pytest.approx(naive_error, rel=.02)


@SDES
@pytest.mark.parametrize("end", [.5, 1.])
def test_forward_moments_tend_to_the_marginal_at_first_order(sde, end):
    end = min(end, LATEST.get(sde, 1.))
    a, sigma = sde.marginal(end)
    means, variances = [], []
    for n in STEPS:
        t = np.linspace(0, end, n + 1)
        table = coefficients(sdes.forward_sde_step, sde=sde, t=t[:-1], dt=np.diff(t))
        mean, variance = moments(table, 1., sde.marginal(0.)[1]**2)
        means.append(mean - a)
        variances.append(variance - sigma**2)
    assert order(variances) == pytest.approx(1, abs=.06)
    if sde in (VE(), FlowMatching()):  # straight in t, so that Euler's step is exact
        assert np.abs(means).max() < 1e-14
    else:
        assert order(means) == pytest.approx(1, abs=.06)


@SDES
def test_simulated_paths_have_those_moments(sde):
    n, times = 2**14, sde.T * np.linspace(0, 1, 51)**2  # uneven: each step has its own dt
    x = np.full((n, 1), 3.)
    *_, x = samplers.forward_sde(x, sde, times, samplers.Reference(seed=2))
    table = coefficients(sdes.forward_sde_step, sde=sde, t=times[:-1], dt=np.diff(times))
    mean, variance = moments(table, 3., 0.)
    # n normals: the mean's std is (variance / n)^(1/2), the variance's (2 / n)^(1/2) of itself
    assert abs(x.mean() - mean) < 4.9 * (variance / n)**.5  # alpha 1e-6
    assert x.var() == pytest.approx(variance, rel=4.9 * (2 / n)**.5)


def test_a_number_of_forward_steps_is_even_times():
    paths = [list(samplers.forward_sde(np.ones((4, 1)), VP(), times, samplers.Reference(seed=2)))
             for times in (5, np.linspace(0, 1, 6))]
    np.testing.assert_allclose(*paths, rtol=1e-12)


def test_sub_vp_has_less_variance_than_vp_at_every_time():
    t = np.geomspace(1e-8, 1, 1000)
    assert (SubVP().marginal(t)[1] < VP().marginal(t)[1]).all()
    np.testing.assert_array_equal(SubVP().marginal(t)[0], VP().marginal(t)[0])


@SDES
def test_the_prior_is_the_last_marginal(sde):
    # sigma(T) misses 1 by what is left of the data, a^2 = 4.3e-5
    assert sde.marginal(sde.T)[1] == pytest.approx(sdes.prior_std(sde), rel=4.4e-5)


@SDES
def test_time_is_where_the_marginal_has_that_ratio(sde):
    # VE's t is a ratio of logarithms, right to eps of 1; the others' to eps of t itself
    t = np.concatenate((np.geomspace(1e-6, .1, 20), np.linspace(.1, sde.T, 20)))
    a, sigma = sde.marginal(t)
    np.testing.assert_allclose(sde.time(sigma / a), t, rtol=2e-15, atol=1e-15 * (sde == VE()))


def test_time_holds_for_a_constant_beta():
    for sde in (VP(2., 2.), SubVP(2., 2.)):
        a, sigma = sde.marginal(.3)
        assert sde.time(sigma / a) == pytest.approx(.3, rel=1e-14)


# Chains and their limits


def test_many_forward_steps_are_the_multi_step_form():
    betas = ddpm.linear_betas()
    table, alpha_bar = coefficients(ddpm.forward_step, beta=betas), ddpm.alpha_bars(betas)
    at_once = coefficients(sdes.perturb, a=alpha_bar**.5, sigma=(1 - alpha_bar)**.5)
    for i in (0, 1, 10, 999):
        mean, variance = moments(table[:i + 1], 1., 0.)
        np.testing.assert_allclose([mean, variance**.5], at_once[i], rtol=1e-12)


def test_ddpm_tends_to_vp():
    # the kept share of the data, sqrt(alpha_bar) against a(t), at t = (i + 1) / N
    gap = [np.abs(ddpm.alpha_bars(betas_of_vp(n))**.5
                  - VP().marginal((np.arange(n) + 1) / n)[0]).max() for n in STEPS]
    assert order(gap) == pytest.approx(1, abs=.06)


def test_smld_tends_to_ve():
    # N (sigma_i^2 - sigma_{i-1}^2) against g^2
    gap = []
    for n in STEPS:
        sigmas = langevin.noise_levels(n, 50., .01)[::-1]
        t = np.arange(1, n) / (n - 1)
        gap.append(np.abs(n * np.diff(sigmas**2) / VE().diffusion(t)**2 - 1).max())
    assert order(gap) == pytest.approx(1, abs=.06)


def test_vp_discretized_is_ddpm():
    f, G = VP().discretize(1., np.arange(1000), 1000)
    table = coefficients(ddpm.forward_step, beta=ddpm.linear_betas())
    np.testing.assert_allclose(np.stack((1 + f, G), -1), table, rtol=1e-14)


def test_ve_discretized_is_smld():
    f, G = VE().discretize(1., np.arange(100), 100)
    assert f == 0
    np.testing.assert_allclose(np.cumsum(G**2)**.5, langevin.noise_levels(100, 50., .01)[::-1],
                               rtol=1e-13)


def test_sub_vp_discretized_is_euler_maruyama():
    i = np.arange(100)
    f, G = SubVP().discretize(1., i, 100)
    table = coefficients(sdes.forward_sde_step, sde=SubVP(), t=i / 99, dt=1 / 100)
    np.testing.assert_allclose(np.stack((1 + f, G), -1), table, rtol=1e-14)


@SDES
def test_reverse_diffusion_tends_to_euler_maruyama(sde):
    # a step's mean a - 1 and b, and its variance c^2, a unit of time
    gap = []
    for n in STEPS:
        i = np.arange(n // 2, int(LATEST.get(sde, 1.) * n))
        one = coefficients(sdes.reverse_diffusion_step, sde=sde, i=i, n=n)
        other = coefficients(sdes.reverse_sde_step, sde=sde, t=sde.T * i / (n - 1), dt=sde.T / n)
        rates = [np.stack((n * (u[:, 0] - 1), n * u[:, 1], n * u[:, 2]**2)) for u in (one, other)]
        gap.append(np.abs(rates[0] - rates[1]).max())
    if sde == SubVP():
        assert max(gap) < 1e-10  # the same step; n * eps a coefficient
    else:
        assert order(gap) == pytest.approx(1, abs=.06)


def test_the_flow_is_the_reverse_step_with_half_the_score_and_no_noise():
    for sde in (VE(), VP(), SubVP(), FlowMatching()):
        a, b, _ = coefficients(sdes.reverse_sde_step, sde=sde, t=.4, dt=.01)
        np.testing.assert_allclose(coefficients(sdes.pf_ode_step, sde=sde, t=.4, dt=.01),
                                   [a, b / 2], rtol=1e-15)


def test_ddim_with_eta_one_is_the_ddpm_posterior():
    betas = ddpm.linear_betas()
    alpha_bar = ddpm.alpha_bars(betas)
    previous, variance = ddpm.previous(alpha_bar), ddpm.posterior_variances(betas)
    levels = {"alpha_bar": alpha_bar, "alpha_bar_prev": previous}

    def posterior(x, s, z, /):
        return ddpm.posterior_step(x, ddpm.predicted_x0(x, s, alpha_bar), z, variance=variance,
                                   **levels)

    ddim = coefficients(ddpm.ddim_step, alpha_bar=alpha_bar, alpha_bar_prev=previous, eta=1.)
    # 1 - alpha_bar of 1e-4 keeps 12 digits; they enter b, which is beta to first order
    np.testing.assert_allclose(ddim, coefficients(posterior), rtol=0, atol=1e-12)
    np.testing.assert_allclose(ddim, coefficients(ddpm.ancestral_step, beta=betas,
                                                  variance=variance), rtol=0, atol=1e-12)


def test_ddim_with_eta_zero_keeps_the_noise_it_found():
    # x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps goes to the same x0 and eps one level down
    x0, eps = np.array([.3, -1.]), np.array([2., .7])
    x = sdes.perturb(x0, eps, .5**.5, .5**.5)
    s = -eps / .5**.5
    np.testing.assert_allclose(ddpm.ddim_step(x, s, 0., .5, .9, 0.),
                               sdes.perturb(x0, eps, .9**.5, .1**.5), rtol=1e-14)
    np.testing.assert_allclose(ddpm.ddim_step(x, s, 0., .5, 1., 0.), x0, rtol=1e-14)


@pytest.mark.parametrize("eta", [0., .3, 1.])
def test_ddim_leads_from_marginal_to_marginal_whatever_eta(eta):
    # given x0 the score is -(x - alpha_bar^(1/2) x0) / (1 - alpha_bar): mean to mean, and
    # variance 1 - alpha_bar to 1 - alpha_bar_prev, of which (eta c_1)^2 is new
    now, then = .3, .8
    a, b, c = coefficients(ddpm.ddim_step, alpha_bar=now, alpha_bar_prev=then, eta=eta)
    assert a * now**.5 == pytest.approx(then**.5, rel=1e-14)
    assert (a - b / (1 - now))**2 * (1 - now) + c**2 == pytest.approx(1 - then, rel=1e-13)
    full = coefficients(ddpm.ddim_step, alpha_bar=now, alpha_bar_prev=then, eta=1.)
    assert c == pytest.approx(eta * full[2], rel=1e-14)


# Schedules


def test_the_betas_of_a_subset_have_its_alpha_bars():
    alpha_bar, indices = ddpm.alpha_bars(ddpm.linear_betas()), [3, 10, 400, 999]
    betas = ddpm.subset_betas(alpha_bar[indices])
    np.testing.assert_allclose(ddpm.alpha_bars(betas), alpha_bar[indices], rtol=1e-11)
    np.testing.assert_allclose(ddpm.subset_betas(alpha_bar), ddpm.linear_betas(),
                               rtol=0, atol=1e-15)
    for bad in ([.5, .5], [.5, .9], [1.1], [.5, -.1]):
        with pytest.raises(ValueError, match="alpha_bar|beta"):
            ddpm.subset_betas(bad)


def test_posterior_variances_lie_between_zero_and_beta():
    betas = ddpm.linear_betas()
    variances = ddpm.posterior_variances(betas)
    assert variances[0] == 0
    assert (variances[1:] > 0).all() and (variances < betas).all()


def test_rho_levels_are_even_in_their_root():
    levels = solvers.rho_levels(18, 80., .002)
    np.testing.assert_allclose(np.diff(levels**(1 / 7)), (.002**(1 / 7) - 80**(1 / 7)) / 17,
                               rtol=1e-12)
    np.testing.assert_allclose(levels[[0, -1]], [80, .002], rtol=1e-13)
    np.testing.assert_allclose(solvers.rho_levels(5, 3., 1., rho=1.), [3, 2.5, 2, 1.5, 1])


def test_langevin_step_sizes_keep_the_ratio_of_step_to_noise():
    sigmas = langevin.noise_levels()
    assert sigmas[0] == 1 and sigmas[-1] == pytest.approx(.01, rel=1e-15) and len(sigmas) == 10
    np.testing.assert_allclose(sigmas[1:] / sigmas[:-1], .01**(1 / 9), rtol=1e-14)
    np.testing.assert_allclose(langevin.step_sizes(sigmas) / sigmas**2, 2e-5 / .01**2, rtol=1e-14)


RHO_LEVELS = partial(solvers.rho_levels, n=5, sigma_max=80., sigma_min=.002)


@pytest.mark.parametrize("make, bad", [
    (ddpm.linear_betas, {"n": 0}), (ddpm.linear_betas, {"n": 2.5}), (ddpm.cosine_betas, {"n": 2.5}),
    (langevin.noise_levels, {"n": 2.5}), (RHO_LEVELS, {"n": np.nan}),
    (ddpm.linear_betas, {"beta_min": 0.}),
    (ddpm.linear_betas, {"beta_max": 1.}), (ddpm.linear_betas, {"beta_min": np.nan}),
    (langevin.noise_levels, {"n": 0}), (langevin.noise_levels, {"sigma_min": 0.}),
    (langevin.noise_levels, {"sigma_min": 2.}), (langevin.noise_levels, {"sigma_max": np.inf}),
    (RHO_LEVELS, {"n": 1}), (RHO_LEVELS, {"sigma_min": 90.}), (RHO_LEVELS, {"sigma_min": np.nan}),
    (VE, {"sigma_min": 0.}), (VE, {"sigma_max": .001}), (VP, {"beta_min": -1.}),
    (VP, {"beta_max": np.nan}), (SubVP, {"beta_min": 30.})])
def test_a_schedule_outside_its_range_is_refused_by_name(make, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make(**bad)


# Coefficients


@pytest.mark.parametrize("batch", [None, 5], ids=["scalars", "one a sample"])
@pytest.mark.parametrize("op", kernels.OPS.values(), ids=kernels.OPS)
def test_every_step_is_affine_with_the_coefficients_it_tells(op, batch):
    rng = np.random.default_rng(7)
    for _ in range(20):
        parameters = op.parameters(rng, batch)
        columns = {k: v[:, None] if np.ndim(v) else v for k, v in parameters.items()}
        u = rng.normal(size=(len(operands(op.step)), 5, 3))
        table = coefficients(op.step, **parameters)
        assert table.dtype == np.float64
        assert table.shape == np.broadcast_shapes(*map(np.shape, parameters.values())) + (len(u),)
        terms = np.moveaxis(table, -1, 0).reshape(len(u), -1, 1) * u
        np.testing.assert_allclose(op.step(*u, **columns), terms.sum(0), rtol=0,
                                   atol=1e-12 * np.abs(terms).sum(0).max())
        assert not np.any(op.step(*np.zeros_like(u), **columns))


@pytest.mark.parametrize("op", kernels.OPS.values(), ids=kernels.OPS)
def test_every_step_takes_torch_tensors_as_it_takes_arrays(op):
    rng = np.random.default_rng(8)
    u, parameters = rng.normal(size=(len(operands(op.step)), 5, 3)), op.parameters(rng)
    of_tensors = op.step(*map(torch.from_numpy, u), **parameters)
    np.testing.assert_array_equal(of_tensors.numpy(), op.step(*u, **parameters))


def test_operands_are_the_positional_only_arguments():
    assert operands(langevin.langevin_step) == ("x", "s", "z")
    assert operands(sdes.pf_ode_step) == ("x", "s")
    assert operands(sdes.perturb) == ("x0", "z")


def test_a_schedule_gives_the_rows_that_its_entries_give():
    t = np.linspace(1, .1, 7)
    table = coefficients(sdes.reverse_sde_step, sde=VP(), t=t, dt=.01)
    rows = [coefficients(sdes.reverse_sde_step, sde=VP(), t=t_k, dt=.01) for t_k in t]
    np.testing.assert_allclose(table, rows, rtol=1e-15)
    mixed = coefficients(ddpm.ancestral_step, beta=np.array([.1, .2]), variance=0.)
    assert mixed.shape == (2, 3)
    assert not mixed[:, 2].any()
