"""Samplers without Monte Carlo, on data N(0, 1/4): their state is the variance (tests/law.py)."""

from dataclasses import dataclass

import numpy as np
import pytest

from minidiff import ddpm, kernels, langevin, samplers, solvers
from minidiff import sde as sdes
from minidiff.sde import EDM, VE, VP, SubVP
from minidiff.tour import variances

DATA = .25
N = 1000
T_TO_EPS = np.linspace(1, 1e-3, N)
TO_1E_5 = np.append(np.linspace(1, 1e-5, N), 0.)


def slope(a, sigma):
    """k of the exact score of a x0 + sigma z."""
    return -1 / (a**2 * DATA + sigma**2)


def at_time(sde):
    """The exact score of a continuous process, a function of t."""
    return lambda _, t: slope(*sde.marginal(t))


def at_index(alpha_bar):
    """The exact score of a discrete chain, a function of i."""
    return lambda _, i: slope(alpha_bar[i]**.5, (1 - alpha_bar[i])**.5)


VP_CHAIN = ddpm.alpha_bars(ddpm.linear_betas())


def at_index_of_time(alpha_bar):
    """The same, a function of the time, i = trunc(t (N - 1))."""
    return lambda _, t: at_index(alpha_bar)(_, int(t * (len(alpha_bar) - 1)))


def final(states):
    *_, last = states
    return last


def order(errors, steps):
    """The order of convergence: the least-squares slope of ln error over ln (1 / steps)."""
    return -np.polyfit(np.log(steps), np.log(np.abs(errors)), 1)[0]


def test_euler_maruyama_on_vp():
    # 1000 steps of 1/N, the last from 1e-3 to 0 with its noise; then the grid's own 999
    last_step_too = samplers.iterate(sdes.reverse_sde_step, at_time(VP()), 1., T_TO_EPS, variances,
                                   sde=VP(), t=T_TO_EPS, dt=1 / N)
    assert round(final(last_step_too), 5) == .25035
    on_grid = samplers.reverse_sde(at_time(VP()), 1., VP(), T_TO_EPS, variances)
    assert round(final(on_grid), 5) == .25044


def test_reverse_diffusion_on_vp():
    # on that grid trunc(t (N - 1) / T) is i where t is (i + 1) / N
    np.testing.assert_array_equal(np.trunc(T_TO_EPS * (N - 1)), np.arange(N)[::-1])
    continuous = samplers.reverse_diffusion(at_time(VP()), 1., VP(), N, variances)
    assert round(final(continuous), 5) == .25199
    discrete = samplers.reverse_diffusion(at_index_of_time(VP_CHAIN), 1., VP(), N, variances)
    assert round(final(discrete), 5) == .25148


@pytest.mark.parametrize("kind, variance", [
    ({}, .25075), ({"last_noise": True}, .25085),
    ({"variances": ddpm.posterior_variances(ddpm.linear_betas())}, .24613)])
def test_ancestral_sampling(kind, variance):
    betas = ddpm.linear_betas()
    score = at_index(ddpm.alpha_bars(betas))
    assert round(final(samplers.ancestral(score, 1., betas, variances, **kind)), 5) == variance


@pytest.mark.parametrize("spacing, n, percent, digits", [
    ("leading", 10, -44, 0), ("leading", 50, -10.7, 1), ("leading", 1000, -.60, 2),
    ("trailing", 10, -45.3, 1), ("trailing", 50, -11.1, 1)])
def test_ddim_narrows_by_its_step(spacing, n, percent, digits):
    indices = np.arange(n) * (N // n) + (spacing == "trailing") * (N // n - 1)
    alpha_bar = ddpm.alpha_bars(ddpm.linear_betas())[indices]
    error = final(samplers.ddim(at_index(alpha_bar), 1., alpha_bar, variances)) / DATA - 1
    assert round(100 * error, digits) == percent


def test_reverse_diffusion_and_ancestral_sampling_on_ve():
    # the score at the level of the index, sigma_i, i = trunc(t (N - 1))
    ve = VE()
    score = lambda _, t: at_time(ve)(_, np.trunc(t * (N - 1)) / (N - 1))
    for loop, percent in ((samplers.reverse_diffusion, .86), (samplers.ancestral_sde, -.89)):
        error = final(loop(score, ve.sigma_max**2, ve, TO_1E_5, variances)) / DATA - 1
        assert round(100 * error, 2) == percent


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
    return solvers.rho_levels(n + 1, 80., .002)


STEPS = 128, 256, 512, 1024
EXACT = DATA + .002**2  # the variance at sigma = .002


def errors(loop, sde, grids, f=lambda variance: variance):
    """f(final variance) - f(exact) from the exact start, for each grid of sde's times."""
    return [f(final(loop(at_time(sde), DATA + 80**2, sde, grid, variances))) - f(EXACT)
            for grid in grids]


def linear(x, sigma):
    """The exact score of x0 + sigma z, for states themselves."""
    return slope(1., sigma) * x


def std_errors(loop, grid):
    """Of a flow along sigmas, 80 ... .002: x' = x'/x x, so the state itself tells the std. A
    solver that goes on to 0 is stopped before."""
    factor = (80**2 + DATA)**.5 / 80
    return [next(x for k, x in enumerate(loop(linear, 80., grid(n), samplers.Reference()))
                 if k == n - 1) * factor - EXACT**.5 for n in STEPS]


def chain_errors(loop, grid):
    """Of DDPM's loops, in x / a at sigma / a = .002, one step before the data."""
    def error(alpha_bar):
        *_, last, _ = loop(at_index(alpha_bar), alpha_bar[-1] * DATA + 1 - alpha_bar[-1], alpha_bar)
        return last / alpha_bar[0] - EXACT
    return [error(1 / (1 + grid(n)[::-1]**2)) for n in STEPS]


def on_betas(variance):
    def loop(score, x, alpha_bar):
        betas = ddpm.subset_betas(alpha_bar)
        return samplers.ancestral(score, x, betas, variances, variance(betas))
    return loop


def own_chain_errors(loop, grid):
    """Of VE's own chain of n + 1 levels, at its smallest; its spacing is geometric."""
    ve = VE(.002, 80.)
    starts = [np.append(np.linspace(1, 1e-5 / n, n + 1), 0.) for n in STEPS]
    return [list(loop(at_time(ve), DATA + 80**2, ve, t, variances))[-2] - EXACT for t in starts]


# step: [(errors of a grid, measured slope on the geometric one)], the steps of OPS with an order
CONVERGENCE = {
    sdes.pf_ode_step: [(lambda grid: std_errors(lambda score, x, sigmas, engine: samplers.pf_ode(
        score, x, EDM(), sigmas, engine), grid), .996)],
    sdes.heun_step: [(lambda grid: std_errors(lambda score, x, sigmas, engine: samplers.heun(
        score, x, EDM(), sigmas, engine), grid), 2.009)],
    solvers.dpmpp_2m_step: [(lambda grid: std_errors(samplers.dpmpp_2m, grid), 1.999)],
    # in Brownian time u = sigma^2 a step's noise has the exact variance
    sdes.reverse_sde_step: [(lambda grid: errors(
        samplers.reverse_sde, Power(.5), (grid(n)**2 for n in STEPS)), 1.023)],
    sdes.reverse_diffusion_step: [(lambda grid: own_chain_errors(
        samplers.reverse_diffusion, grid), 1.023)],
    sdes.ancestral_step: [(lambda grid: own_chain_errors(samplers.ancestral_sde, grid), .977)],
    ddpm.ancestral_step: [
        (lambda grid: chain_errors(on_betas(ddpm.posterior_variances), grid), .977),
        (lambda grid: chain_errors(on_betas(lambda betas: betas), grid), 1.009)],
    ddpm.ddim_step: [(lambda grid: chain_errors(lambda score, x, alpha_bar: samplers.ddim(
        score, x, alpha_bar, variances), grid), .991)],
}


@pytest.mark.parametrize("step", [op.step for op in kernels.OPS.values()
                                  if hasattr(op.step, "order")], ids=lambda s: s.__name__)
def test_each_solver_converges_at_the_order_it_states(step):
    for errors_on, measured in CONVERGENCE[step]:
        slope_of = order(errors_on(geometric), STEPS)
        assert slope_of == pytest.approx(step.order, abs=.06)
        assert round(slope_of, 3) == measured
        assert order(errors_on(crowded), STEPS) == pytest.approx(step.order, abs=.06)


def test_the_clipped_and_the_paired_steps_state_no_order():
    # noise, forward and one-level steps: what is not a solver
    assert {name for name, op in kernels.OPS.items() if not hasattr(op.step, "order")} == {
        "normal", "perturb", "langevin", "ddpm_forward", "ddpm_clipped", "forward_sde",
        "posterior_mean", "guided", "guided_reverse_sde"}


@pytest.mark.parametrize("sde", [VP(), SubVP()])
def test_heun_is_of_second_order_in_the_time_of_vp_and_sub_vp(sde):
    exact = (sde.marginal(.01)[0]**2 * DATA + sde.marginal(.01)[1]**2)**.5
    start = sum(v**2 for v in (sde.marginal(1.)[0] * DATA**.5, sde.marginal(1.)[1]))**.5
    score = lambda x, t: slope(*sde.marginal(t)) * x
    n = 4 * np.array(STEPS)
    gap = [final(samplers.heun(score, start, sde, np.linspace(1, .01, k + 1), samplers.Reference()))
           - exact for k in n]
    assert order(gap, n) == pytest.approx(sdes.heun_step.order, abs=.06)


def test_on_ve_in_its_own_time_the_first_order_error_of_the_variance_cancels():
    # a step from u = sigma^2 errs by ~ (u - V) / (u + V) du^2 / u, du ~ u dt, and is carried to
    # the end by ((u_0 + V) / (u + V))^2: in sum dt int (u - V) / (u + V)^3 du, whose
    # antiderivative -u / (u + V)^2 vanishes at both ends. What is left is of second order.
    ve = VE(.002, 80.)
    variance = errors(samplers.reverse_sde, ve, (np.linspace(1, 0, n + 1) for n in STEPS))
    assert order(variance, STEPS) == pytest.approx(2, abs=.06)


def test_langevin_settles_on_a_variance_that_exceeds_the_targets_by_its_step():
    # v = (1 - eps / 2V)^2 v + eps  =>  v = V / (1 - eps / 4V); 200 steps contract by .8^400
    for eps in .1, .3:
        settled = pytest.approx(DATA / (1 - eps / (4 * DATA)), rel=1e-12)
        plain = samplers.langevin(lambda _: slope(1., 0.), 9., 200, variances, eps=eps)
        assert final(plain) == settled
        annealed = samplers.annealed_langevin(lambda *_: slope(1., 0.), 9., [1.], variances,
                                              eps=eps, n_steps=200)
        assert final(annealed) == settled


def test_denoise_leaves_the_variance_of_the_posterior_mean():
    # E[x0 | x] = a V x / (a^2 V + sigma^2) of an x of variance a^2 V + sigma^2
    of_x = .6**2 * DATA + .8**2
    left = samplers.denoise(lambda *_: slope(.6, .8), of_x, None, variances, a=.6, sigma=.8)
    assert left == pytest.approx(.6**2 * DATA**2 / of_x, rel=1e-14)


def test_the_recursion_is_the_variance_of_the_samples():
    betas, n = ddpm.linear_betas(20, 1e-3, .4), 2**15
    score = at_index(ddpm.alpha_bars(betas))
    x = samplers.prior((n, 1), seed=5)
    engine = samplers.Reference(seed=5)
    x = final(samplers.ancestral(lambda x, i: score(x, i) * x, x, betas, engine))
    exact = final(samplers.ancestral(score, 1., betas, variances))
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


@pytest.mark.parametrize("solver, errors", [(samplers.edm, (5.5, 1.2, .29, .07)),
                                            (samplers.dpmpp_2m, (6.2, 1.3, .29, .07))])
def test_second_order_solvers_std_error(solver, errors):
    """Per cent, n = 18 ... 144 of EDM's levels, to the printed digits (half a unit of the last,
    and of 2M's .295 at n = 72, which prints as .29)."""
    for n, percent in zip((18, 36, 72, 144), errors):
        std = final(solver(linear, 80., solvers.rho_levels(n, 80., .002), samplers.Reference()))
        half = .05 if percent > 1 else .0055
        assert abs(100 * (std / DATA**.5 - 1) - percent) < half


def test_heun_needs_two_evaluations_a_step_but_the_last():
    levels, calls = solvers.rho_levels(18, 80., .002), []
    for loop, n in ((samplers.edm, 35), (samplers.dpmpp_2m, 18)):
        calls.clear()
        engine = samplers.Reference()
        states = loop(lambda x, s: calls.append(s) or linear(x, s), 80., levels, engine)
        assert len(list(states)) == 18 and len(calls) == n and min(calls) > .0019


def test_churn_follows_edms_algorithm():
    """Levels raised by gamma inside [s_min, s_max] alone; the loop's variance, put together from
    its answers to each noise alone, is that of the recursion."""
    sigmas = solvers.rho_levels(18, 80., .002)
    raised, std = solvers.churn(sigmas, s_churn=40., s_min=.05, s_max=50., s_noise=1.003)
    inside = (sigmas >= .05) & (sigmas <= 50)
    np.testing.assert_allclose(raised / sigmas, np.where(inside, 2**.5, 1.), rtol=1e-15)
    np.testing.assert_allclose(std, 1.003 * (raised**2 - sigmas**2)**.5, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(solvers.churn(sigmas, s_churn=4.5)[0], 1.25 * sigmas, rtol=1e-15)
    with pytest.raises(ValueError, match="s_churn"):
        solvers.churn(sigmas, s_churn=-1.)
    for bad in ([], [[2., 1.]], [np.nan], [1., 2.]):
        with pytest.raises(ValueError, match="sigmas must"):
            solvers.churn(bad)
    # the state is N(0, v): stirring adds std^2, a Heun step scales by its factor from there
    v = 80.**2
    for k in range(18):
        v += std[k]**2
        after = sigmas[k + 1] if k < 17 else 0.
        one = samplers.heun(linear, 1., EDM(200.), [raised[k], after], samplers.Reference())
        v *= final(one)**2
    churn = {"s_churn": 40., "s_min": .05, "s_max": 50., "s_noise": 1.003}

    def end(start, noise):
        """The sampler's end for a start and the size of each step's noise: it is linear."""
        engine = samplers.Reference(normal=lambda shape, k, tag: np.full(shape, noise[k]))
        return final(samplers.edm(linear, np.full((1, 1), start), sigmas, engine, **churn)).item()
    parts = [end(80., np.zeros(18)), *(end(0., impulse) for impulse in np.eye(18))]
    assert sum(part**2 for part in parts) == pytest.approx(v, rel=1e-12)
