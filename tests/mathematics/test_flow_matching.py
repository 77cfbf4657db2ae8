"""Flow matching as a process: the velocity's form and the score's are one, everywhere."""

import numpy as np
import pytest

from minidiff import kernels, noise, samplers
from minidiff import sde as sdes
from minidiff.families import FAMILIES
from minidiff.predictions import as_score, flow_velocity, in_sigma, posterior_mean, rescaled
from minidiff.sde import EDM, VE, VP, FlowMatching, SubVP
from minidiff.targets import Mixture
from minidiff.tour import variances

FLOW = FlowMatching()
PLANE = Mixture([.3, .7], [[-1., .5], [1.5, -.5]], [.5, .8])
SMALL = Mixture([.3, .7], [[-.6, -.3], [.6, .3]], .01)
DATA = .25
STEPS = np.array([128, 256, 512, 1024])


def velocity_of(data):
    """E[z - x0 | x_t = x], from the joint normal of (x0, z) in each component: no score in it."""
    def velocity(x, t):
        a = 1 - t
        v = data.variances
        difference = x[:, None] - a * data.means
        spread = a**2 * v + t**2
        log_p = np.log(data.weights) - .5 * (difference**2 / spread + np.log(spread)).sum(-1)
        gamma = np.exp(log_p - log_p.max(1, keepdims=True))
        gamma /= gamma.sum(1, keepdims=True)
        x0 = data.means + a * v / spread * difference
        z = t / spread * difference
        return (gamma[..., None] * (z - x0)).sum(1)
    return velocity


def score_of(data, sde=FLOW):
    return lambda x, t: data.noised(*sde.marginal(t)).score(x)


def test_the_flows_velocity_is_the_mean_of_the_straight_lines():
    x = noise.normal((64, 2), seed=1).astype(float)
    for t in (1e-3, .3, .9, FLOW.T):
        s = score_of(PLANE)(x, t)
        want = velocity_of(PLANE)(x, t)
        # f and g^2 s / 2 are 1 / (1 - t) times as large and cancel: 1,000 eps at T
        np.testing.assert_allclose(sdes.flow(x, s, FLOW, t), want, rtol=0, atol=1e-11)
        np.testing.assert_allclose(flow_velocity(x, s, *FLOW.marginal(t)), want,
                                   rtol=0, atol=1e-11)
        np.testing.assert_allclose(-(x + t * s) / (1 - t), want, rtol=0, atol=1e-11)
        D = posterior_mean(x, s, *FLOW.marginal(t))
        np.testing.assert_allclose((x - D) / t, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("times", [FLOW.T * np.linspace(1, 0, 11),
                                   FLOW.T * np.linspace(1, 0, 101)**2], ids=len)
def test_eulers_steps_along_the_velocity_are_the_probability_flows(times):
    """One trajectory, to 1e-10: x - v dt on a network that returns v, beside the score's form."""
    velocity = velocity_of(PLANE)
    x = x_own = samplers.prior((32, 2), FLOW.prior_std).astype(float)
    states = samplers.pf_ode(score_of(PLANE), x, FLOW, times, samplers.Reference())
    score = as_score(velocity, flow_velocity, FLOW.marginal)
    by_score = samplers.pf_ode(score, x, FLOW, times, samplers.Reference())
    for t, t_next, state, other in zip(times, times[1:], states, by_score):
        x_own = x_own - velocity(x_own, t) * (t - t_next)
        np.testing.assert_allclose(state, x_own, rtol=0, atol=1e-10)
        np.testing.assert_allclose(other, x_own, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_that_returns_the_velocity_runs_every_family(family):
    """States of moduli up to 80, and a chain of up to 96 steps that multiplies what rounding
    makes of a score: 1e-10 of the exact score's own. RK45's steps follow from the states."""
    of_flow = as_score(velocity_of(SMALL), flow_velocity, FLOW.marginal)
    z = noise.normal((16, 2), seed=3).astype(np.float64)
    exact = lambda x, sigma: SMALL.noised(1., sigma).score(x)
    states = [FAMILIES[family](score, z, 40, samplers.Reference(seed=4))
              for score in (exact, in_sigma(of_flow, FLOW))]
    for want, got in zip(*states, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sde", [VE(), VP(), SubVP(), EDM(), FLOW], ids=str)
def test_a_score_in_sigma_undoes_a_rescaled_one(sde):
    """t to sigma and back rounds by eps, which the score near the data multiplies by 1 / sigma."""
    x = noise.normal((16, 2), seed=2).astype(float)
    own = score_of(PLANE, sde)
    by_sigma = in_sigma(own, sde)
    for sigma in (.02, 1., 40.):
        want = PLANE.noised(1., sigma).score(x)
        np.testing.assert_allclose(by_sigma(x, sigma), want, rtol=1e-11)
        t = float(sde.time(sigma))
        np.testing.assert_allclose(rescaled(by_sigma, sde.marginal)(x, t), own(x, t), rtol=1e-11)


@pytest.mark.parametrize("sde", [VE(), VP(), SubVP(), EDM(), FLOW], ids=str)
@pytest.mark.parametrize("family", ["ddim", "reverse_sde_flow", "flow_matching", "heun",
                                    "pf_ode"])
def test_a_network_is_asked_at_its_own_times_alone(sde, family):
    """Families begin at up to sigma 999, VE's network knows 50: beyond, D is off by v |u| / 50 at
    x = sigma u, v the data's variance along their line, .39. That is 1e-4 of x itself, so that
    the noise that a flow brings to 50 is off by 1e-4 of it: measured, 1e-3 at its end."""
    def own(x, t):
        assert 0 <= t <= sde.T
        return score_of(SMALL, sde)(x, t)
    z = noise.normal((16, 2), seed=3).astype(np.float64)
    exact = lambda x, sigma: SMALL.noised(1., sigma).score(x)
    *_, want = FAMILIES[family](exact, z, 40, samplers.Reference(seed=4))
    *_, got = FAMILIES[family](in_sigma(own, sde), z, 40, samplers.Reference(seed=4))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3)


def test_beyond_its_levels_the_clean_data_are_those_of_the_end():
    """E[x0 | x] at sigma 999 by VE's network, which ends at 50; below .01 the score of .01."""
    own = score_of(SMALL, VE())
    by_sigma = in_sigma(own, VE())
    x = noise.normal((64, 2), seed=1).astype(float)
    for sigma in (60., 999.):
        D = posterior_mean(sigma * x, by_sigma(sigma * x, sigma), 1., sigma)
        want = posterior_mean(sigma * x, SMALL.noised(1., sigma).score(sigma * x), 1., sigma)
        # v |x| / sigma and v |x| / 50, of |x| below 4
        assert np.abs(D - want).max() < .39 * 4 / 50
    np.testing.assert_allclose(by_sigma(.01 * x, 1e-3), own(.01 * x, 0.), rtol=1e-12)
    for bad in (0., -1., np.nan):
        with pytest.raises(ValueError, match="sigma must be in"):
            by_sigma(x, bad)


def test_a_tensors_dtype_is_kept():
    torch = pytest.importorskip("torch")
    x = torch.ones(2, 3)
    score = in_sigma(as_score(lambda x, t: -x, flow_velocity, FLOW.marginal), FLOW)
    assert score(x, 2.).dtype == torch.float32


# ---- orders, on data N(0, 1/4) ----

def at_time(_, t):
    """The exact score's slope; the state is the variance (minidiff.tour.variances)."""
    a, sigma = FLOW.marginal(t)
    return -1 / (a**2 * DATA + sigma**2)


def variance_at(t):
    a, sigma = FLOW.marginal(t)
    return a**2 * DATA + sigma**2


def even(n):
    return np.linspace(.95, .05, n + 1)


def crowded(n):
    """Even in ln(t / (1 - t)), between the same ends."""
    return FLOW.time(np.geomspace(19, 1 / 19, n + 1))


def last(states):
    *_, x = states
    return x


@pytest.mark.parametrize("grid", [even, crowded])
@pytest.mark.parametrize("step", [sdes.pf_ode_step, sdes.reverse_sde_step, sdes.heun_step],
                         ids=lambda step: step.__name__)
def test_a_step_keeps_its_order_on_straight_paths(step, grid):
    errors = []
    for n in STEPS:
        times = grid(n)
        if step is sdes.heun_step:  # a flow is linear: the state is the std
            x = samplers.heun(lambda x, t: at_time(x, t) * x, variance_at(.95)**.5, FLOW, times,
                              samplers.Reference())
            errors.append(last(x) - variance_at(.05)**.5)
            continue
        x = samplers.reverse_sde(at_time, variance_at(.95), FLOW, times, variances, step)
        errors.append(last(x) - variance_at(.05))
    slope = -np.polyfit(np.log(STEPS), np.log(np.abs(errors)), 1)[0]
    assert slope == pytest.approx(step.order, abs=.06)


def test_its_own_chain_is_exact_forwards_and_of_first_order_backwards():
    n = 200
    i = np.arange(n)
    f, G = FLOW.discretize(1., i, n)
    mean, variance = 1., 0.
    for kept, std in zip(1 + f, G):
        mean, variance = kept * mean, kept**2 * variance + std**2
    # of 200 products; the last kept share is .17, after 1 - t that cancels to 1e-3
    np.testing.assert_allclose([mean, variance], [1 - FLOW.T, FLOW.T**2], rtol=1e-12)
    errors = []
    for n in 2 * STEPS:
        times = np.append(FLOW.T * np.linspace(1, 1 / n, n), 0.)
        *_, before_last, _ = samplers.reverse_diffusion(at_time, variance_at(FLOW.T), FLOW, times,
                                                        variances)
        errors.append(before_last - variance_at(times[-2]))
    assert -np.polyfit(np.log(STEPS), np.log(np.abs(errors)), 1)[0] == pytest.approx(1, abs=.06)


@pytest.mark.parametrize("loop", [samplers.reverse_sde, samplers.pf_ode, samplers.heun,
                                  samplers.reverse_diffusion, samplers.predictor_corrector],
                         ids=lambda loop: loop.__name__)
def test_every_loop_has_the_same_bits_on_every_backend(loop):
    """A fused run, on the CPU's backends, beside the NumPy backend's, with ==."""
    score = lambda x, t: -x
    z = noise.normal((8, 3), seed=5)
    runs = [list(loop(score, z, FLOW, 12, kernels.Fused(seed=1, backend=name)))
            for name in ("numpy", "torch", "host")]
    for states in zip(*runs, strict=True):
        assert np.isfinite(states[0]).all()
        assert (states[0] == states[1]).all() and (states[0] == states[2]).all()


def test_time_ends_before_the_data_are_gone():
    with pytest.raises(ValueError, match=r"t must be in \[0, 0.999\], got 1"):
        list(samplers.pf_ode(lambda x, t: x, np.ones((1, 2)), FLOW, [1., .5],
                             samplers.Reference()))
