"""Samplers without Monte Carlo. For data N(0, 1/4) the exact score is linear, s = k x, so every
step is an affine map and the variance after it an exact recursion. The loops of minidiff.sample
run that recursion themselves: their state is the variance, their score is k, and their `op`
squares the step's coefficients."""

from dataclasses import dataclass

import numpy as np
import pytest

from minidiff import ddpm, langevin, sample
from minidiff import sde as sdes
from minidiff.affine import coefficients, operands
from minidiff.langevin import rho_levels
from minidiff.score_matching import posterior_mean
from minidiff.sde import VE, VP
from minidiff.solvers import dpmpp_2m_step, heun_step

DATA = .25
N = 1000
T_TO_EPS = np.linspace(1, 1e-3, N)


def variances(step, tag, **parameters):
    """An `op` on variances: var' = (a + b k)^2 var + c^2."""
    table = np.atleast_2d(coefficients(step, **parameters))

    def move(i, variance, k=0.):
        row = dict(zip(operands(step), table[i % len(table)]))
        return (row["x"] + row.get("s", 0.) * k)**2 * variance + row.get("z", 0.)**2
    return move


def slope(a, sigma):
    """k of the exact score of a x0 + sigma z."""
    return -1 / (a**2 * DATA + sigma**2)


def at_time(sde):
    """The exact score of a continuous process, a function of t."""
    return lambda _, t: slope(*sde.marginal(t))


def at_index(alpha_bar):
    """The exact score of a discrete chain, a function of i."""
    return lambda _, i: slope(alpha_bar[i]**.5, (1 - alpha_bar[i])**.5)


def final(states):
    *_, last = states
    return last


def order(errors, steps):
    """The order of convergence: the least-squares slope of ln error over ln (1 / steps)."""
    return -np.polyfit(np.log(steps), np.log(np.abs(errors)), 1)[0]


def test_euler_maruyama_on_vp():
    # 1000 steps of 1/N, the last from 1e-3 to 0 with its noise; then the grid's own 999
    last_step_too = sample.iterate(sdes.reverse_sde_step, at_time(VP()), 1., T_TO_EPS, variances,
                                   sde=VP(), t=T_TO_EPS, dt=1 / N)
    assert round(final(last_step_too), 5) == .25035
    on_grid = sample.reverse_sde(at_time(VP()), 1., VP(), T_TO_EPS, variances)
    assert round(final(on_grid), 5) == .25044


def test_reverse_diffusion_on_vp():
    # on that grid trunc(t (N - 1) / T) is i where t is (i + 1) / N
    np.testing.assert_array_equal(np.trunc(T_TO_EPS * (N - 1)), np.arange(N)[::-1])
    score = lambda _, i: at_time(VP())(_, (i + 1) / N)
    continuous = sample.reverse_diffusion(score, 1., VP(), N, variances)
    assert round(final(continuous), 5) == .25199
    score = at_index(ddpm.alpha_bars(ddpm.linear_betas()))
    discrete = sample.reverse_diffusion(score, 1., VP(), N, variances)
    assert round(final(discrete), 5) == .25148


@pytest.mark.parametrize("kind, variance", [
    ({}, .25075), ({"last_noise": True}, .25085),
    ({"variances": ddpm.posterior_variances(ddpm.linear_betas())}, .24613)])
def test_ancestral_sampling(kind, variance):
    betas = ddpm.linear_betas()
    score = at_index(ddpm.alpha_bars(betas))
    assert round(final(sample.ancestral(score, 1., betas, variances, **kind)), 5) == variance


@pytest.mark.parametrize("spacing, n, percent, digits", [
    ("leading", 10, -44, 0), ("leading", 50, -10.7, 1), ("leading", 1000, -.60, 2),
    ("trailing", 10, -45.3, 1), ("trailing", 50, -11.1, 1)])
def test_ddim_narrows_by_its_step(spacing, n, percent, digits):
    indices = np.arange(n) * (N // n) + (spacing == "trailing") * (N // n - 1)
    alpha_bar = ddpm.alpha_bars(ddpm.linear_betas())[indices]
    error = final(sample.ddim(at_index(alpha_bar), 1., alpha_bar, variances)) / DATA - 1
    assert round(100 * error, digits) == percent


def test_reverse_diffusion_on_ve():
    ve = VE()
    score = lambda _, i: at_time(ve)(_, i / (N - 1))
    error = final(sample.reverse_diffusion(score, ve.sigma_max**2, ve, N, variances)) / DATA - 1
    assert round(100 * error, 2) == .86


@dataclass(frozen=True)
class Power:
    """VE with sigma(t) = t^p: g^2 = 2 p t^(2p - 1). p = 1 is EDM's time, 1/2 Brownian motion."""

    p: float
    T = 6400.

    def drift(self, x, t):
        return 0. * x

    def diffusion(self, t):
        return (2 * self.p)**.5 * t**(self.p - .5)

    def marginal(self, t):
        return 1., t**self.p


def geometric(n):
    """n steps from 80 to .002, even in ln sigma."""
    return langevin.noise_levels(n + 1, 80., .002)


def crowded(n):
    """n steps from 80 to .002, even in sigma^(1/7)."""
    return langevin.rho_levels(n + 1, 80., .002)


STEPS = 128, 256, 512, 1024
EXACT = DATA + .002**2  # the variance at sigma = .002


def errors(loop, sde, grids, f=lambda variance: variance):
    """f(final variance) - f(exact) from the exact start, for each grid of sde's times."""
    return [f(final(loop(at_time(sde), DATA + 80**2, sde, grid, variances))) - f(EXACT)
            for grid in grids]


def test_euler_on_the_probability_flow_is_of_first_order():
    std = errors(sample.pf_ode, Power(1.), map(geometric, STEPS), np.sqrt)
    assert order(std, STEPS) == pytest.approx(1, abs=.06)
    assert round(order(std, STEPS), 3) == .996
    std = errors(sample.pf_ode, Power(1.), map(crowded, STEPS), np.sqrt)
    assert order(std, STEPS) == pytest.approx(1, abs=.06)


def test_the_variance_of_euler_maruyama_is_of_first_order():
    # in Brownian time u = sigma^2: a step's noise has the exact variance
    variance = errors(sample.reverse_sde, Power(.5), (geometric(n)**2 for n in STEPS))
    assert order(variance, STEPS) == pytest.approx(1, abs=.06)
    assert round(order(variance, STEPS), 3) == 1.023
    for grid in geometric, crowded:
        variance = errors(sample.reverse_sde, Power(1.), map(grid, STEPS))
        assert order(variance, STEPS) == pytest.approx(1, abs=.06)


def test_on_ve_in_its_own_time_the_first_order_error_of_the_variance_cancels():
    # a step from u = sigma^2 errs by ~ (u - V) / (u + V) du^2 / u, du ~ u dt, and is carried to
    # the end by ((u_0 + V) / (u + V))^2: in sum dt int (u - V) / (u + V)^3 du, whose
    # antiderivative -u / (u + V)^2 vanishes at both ends. What is left is of second order.
    ve = VE(.002, 80.)
    variance = errors(sample.reverse_sde, ve, (np.linspace(1, 0, n + 1) for n in STEPS))
    assert order(variance, STEPS) == pytest.approx(2, abs=.06)


def test_langevin_settles_on_a_variance_that_exceeds_the_targets_by_its_step():
    # v = (1 - eps / 2V)^2 v + eps  =>  v = V / (1 - eps / 4V); 200 steps contract by .8^400
    for eps in .1, .3:
        states = sample.annealed_langevin(lambda *_: slope(1., 0.), 9., [1.], variances, eps=eps,
                                          n_steps=200)
        assert final(states) == pytest.approx(DATA / (1 - eps / (4 * DATA)), rel=1e-12)


def test_denoise_leaves_the_variance_of_the_posterior_mean():
    # E[x0 | x] = a V x / (a^2 V + sigma^2) of an x of variance a^2 V + sigma^2
    of_x = .6**2 * DATA + .8**2
    left = sample.denoise(lambda *_: slope(.6, .8), of_x, None, variances, a=.6, sigma=.8)
    assert left == pytest.approx(.6**2 * DATA**2 / of_x, rel=1e-14)


def test_the_recursion_is_the_variance_of_the_samples():
    betas, n = ddpm.linear_betas(20, 1e-3, .4), 2**15
    score = at_index(ddpm.alpha_bars(betas))
    x = sample.prior((n, 1), seed=5)
    x = final(sample.ancestral(lambda x, i: score(x, i) * x, x, betas, sample.Reference(seed=5)))
    exact = final(sample.ancestral(score, 1., betas, variances))
    # the variance of n normals: std sqrt(2 / n) of itself, 4.9 of them at alpha 1e-6
    assert np.var(x) == pytest.approx(exact, rel=4.9 * (2 / n)**.5)


def test_what_the_schedules_leave_of_the_data():
    assert ddpm.alpha_bars(ddpm.linear_betas())[-1] == pytest.approx(4.0358e-5, rel=1e-5)
    a, _ = VP().marginal(1.)
    assert a**2 == pytest.approx(np.exp(-10.05), rel=1e-14)
    assert np.exp(-10.05) == pytest.approx(4.3186e-5, rel=1e-5)


def test_the_ve_steps_add_up_to_the_largest_variance():
    _, G = VE().discretize(0., np.arange(N), N)
    assert (G**2).sum() == pytest.approx(50.**2, rel=1e-13)  # N roundings of 1.1e-16


def heun(levels):
    """The factor by which EDM's sampler scales x along the levels, and then to sigma = 0."""
    x, k = 1., lambda sigma: slope(1., sigma)
    for a, b in zip(levels[:-1], levels[1:]):
        euler = x + (b - a) * (-a * k(a) * x)
        x = heun_step(x, k(a) * x, k(b) * euler, sigma=a, sigma_next=b)
    return x, posterior_mean(x, k(levels[-1]) * x, 1., levels[-1])


def dpmpp_2m(levels):
    """The same of DPM-Solver++(2M), first order at the start."""
    x, k, before = 1., lambda sigma: slope(1., sigma), ()
    for i, (a, b) in enumerate(zip(levels[:-1], levels[1:])):
        D = posterior_mean(x, k(a) * x, 1., a)
        x_next = b / a * x + (1 - b / a) * D if i == 0 else dpmpp_2m_step(
            x, k(a) * x, *before, sigma_prev=levels[i - 1], sigma=a, sigma_next=b)
        before, x = (x, k(a) * x), x_next
    return x, posterior_mean(x, k(levels[-1]) * x, 1., levels[-1])


@pytest.mark.parametrize("solver, errors", [(heun, (5.5, 1.2, .29, .07)),
                                            (dpmpp_2m, (6.2, 1.3, .29, .07))])
def test_second_order_solvers_std_error(solver, errors):
    """Per cent, n = 18 ... 144 of EDM's levels, to the printed digits (half a unit of the last,
    and of 2M's .295 at n = 72, which prints as .29)."""
    for n, percent in zip((18, 36, 72, 144), errors):
        std = 80 * solver(rho_levels(n, 80., .002))[1]
        half = .05 if percent > 1 else .0055
        assert abs(100 * (std / DATA**.5 - 1) - percent) < half


@pytest.mark.parametrize("solver, measured", [(heun, 2.009), (dpmpp_2m, 1.999)])
def test_second_order_solvers_converge_at_second_order(solver, measured):
    n = np.array([128, 256, 512, 1024])
    exact = (DATA + .002**2)**.5
    errors = [solver(np.geomspace(80, .002, k + 1))[0] * (80**2 + DATA)**.5 - exact for k in n]
    assert abs(order(errors, n) - 2) < .06 and round(order(errors, n), 3) == measured
