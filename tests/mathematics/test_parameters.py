"""Parameters: out of range they are refused by name; in any precision, and at a process's very
ends, they work."""

from decimal import MAX_EMAX, MIN_EMIN, Decimal, localcontext

import numpy as np
import pytest
import torch

from minidiff import ddpm, kernels, langevin, noise, samplers, sde, solvers, targets
from minidiff.kernels import Fused, apply, coefficients

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def named(value):
    """A case's name without an address, the same in every process."""
    return getattr(value, "__name__", str(value))


# ---- the ends of formulas ----

def test_posterior_variances_where_alpha_bar_underflows():
    """beta~ = (1 - alpha_bar_prev) / (1 - alpha_bar) beta is beta where both are 0."""
    variances = ddpm.posterior_variances([.999] * 1000)
    assert variances[0] == 0 and (variances[200:] == .999).all()
    assert np.isfinite(variances).all() and (np.diff(variances) >= 0).all()


def test_betas_that_are_lost_beside_1_are_refused():
    """beta~ would be 0 / 0. The smallest that is not lost has its variances."""
    for f in (ddpm.alpha_bars, ddpm.posterior_variances):
        with pytest.raises(ValueError, match="betas must be above 2.-53.*got 1e-17"):
            f([.1, 1e-17])
    assert np.isfinite(ddpm.posterior_variances([2.**-52] * 10)).all()


@pytest.mark.parametrize("arguments, words", [
    ({"s_churn": "a"}, "s_churn must be a number"), ({"s_noise": np.inf}, "s_noise must be in"),
    ({"s_churn": -1.}, "s_churn must be in"), ({"s_min": 2., "s_max": 1.}, "need s_min <= s_max"),
    ({"s_churn": np.nan}, "s_churn must be in")], ids=str)
def test_churn_out_of_its_range(arguments, words):
    with pytest.raises((TypeError, ValueError), match=words):
        solvers.churn([2., 1.], **arguments)
    with pytest.raises(ValueError, match="sigma_hat must be finite"), np.errstate(over="ignore"):
        solvers.churn([1.7e308, 1.], s_churn=1.)


@pytest.mark.parametrize("value, error, words", [
    (None, TypeError, "must be a number or a NumPy array, got a NoneType"),
    (1j, TypeError, "got a complex"), (Decimal(1), TypeError, "got a Decimal"),
    ("1", TypeError, "got a str"), (10**400, ValueError, "is beyond float64")], ids=str)
def test_what_is_no_number_is_named(value, error, words):
    for step, name, others in (
            (langevin.langevin_step, "eps", {}), (sde.perturb, "sigma", {"a": 1.}),
            (ddpm.forward_step, "beta", {})):
        with pytest.raises(error, match=f"^{name} .*{words}"):
            coefficients(step, **{name: value}, **others)


@pytest.mark.parametrize("process", [None, 1., np.ones(3)], ids=str)
def test_what_is_no_process_is_named(process):
    with pytest.raises(TypeError, match="^sde must be a process, such as sde.VP"):
        coefficients(sde.pf_ode_step, sde=process, t=.5, dt=.1)


@pytest.mark.parametrize("alpha_bar_prev", [1 - 2.**-53, 1 - 1e-15, 1 - 1e-12, 1 - 1e-7, .9])
@pytest.mark.parametrize("alpha_bar", [1e-5, .1, .3, .5, .8])
def test_ddim_with_all_its_noise_near_the_data(alpha_bar, alpha_bar_prev):
    """At eta = 1 its coefficients are DDPM's posterior's, with x_0 predicted.

    They differ by rounding: where 1 - alpha_bar_prev = v, the part of eps is the root of a
    difference of numbers near v, which rounding moves by 4 2^-53; a root of that is 2^-25.5.
    """
    both = {"alpha_bar": alpha_bar, "alpha_bar_prev": alpha_bar_prev}
    got = coefficients(ddpm.ddim_step, eta=1., **both)
    beta = ddpm.beta_between(**both)
    variance = ddpm.posterior_variance(beta=beta, **both)
    x0 = coefficients(ddpm.predicted_x0, alpha_bar=alpha_bar)
    of_x, of_x0, of_z = coefficients(ddpm.posterior_step, variance=variance, **both)
    want = [of_x + of_x0 * x0[0], of_x0 * x0[1], of_z]
    np.testing.assert_allclose(got, want, rtol=0, atol=2.**-25.5 / alpha_bar**.5)


@pytest.mark.parametrize("rho", [1e-300, 1e-3, .1, 1., 7., 100., 1e6, 1e300])
@pytest.mark.parametrize("high, low", [
    (80., .01), (.5, .01), (1e150, 1e-150), (1e300, 1e-300), (2., 2.)])
def test_levels_of_any_rho_are_those_of_fifty_digits(rho, high, low):
    """To 2^-41: ln low and ln high, up to 691 here, are right to half an ulp, 2^-44, their
    difference to 2^-43; the rest is a few 2^-53."""
    levels = solvers.rho_levels(5, high, low, rho)
    with localcontext(prec=400, Emax=MAX_EMAX, Emin=MIN_EMIN):
        p = 1 / Decimal(rho)
        ratio = (p * (Decimal(low) / Decimal(high)).ln()).exp()  # of the ends' powers
        exact = [Decimal(high) * (1 + Decimal(k) / 4 * (ratio - 1))**Decimal(rho)
                 for k in range(4)]
        exact = [float(v) for v in exact] + [low]
    np.testing.assert_allclose(levels, exact, rtol=2.**-41)
    assert levels[0] == high and levels[-1] == low


# ---- out of range ----

@pytest.mark.parametrize("step, parameters, words", [
    (langevin.langevin_step, {"eps": 0.}, "eps"), (langevin.langevin_step, {"eps": -1.}, "eps"),
    (langevin.langevin_step, {"eps": np.nan}, "eps"),
    (langevin.langevin_step, {"eps": np.inf}, "eps"),
    (langevin.langevin_step, {"eps": np.array([.1, -.1])}, "eps.*got -0.1"),
    (sde.perturb, {"a": .5, "sigma": 0.}, "sigma"), (sde.perturb, {"a": 0., "sigma": 1.}, "a must"),
    (sde.perturb, {"a": np.nan, "sigma": 1.}, "a must"),
    (ddpm.forward_step, {"beta": 0.}, "beta"), (ddpm.forward_step, {"beta": 1.}, "beta"),
    (ddpm.forward_step, {"beta": np.array([.1, 0.])}, "beta"),
    (ddpm.predicted_x0, {"alpha_bar": 1.5}, "alpha_bar"),
    (ddpm.ancestral_step, {"beta": .1, "variance": -1e-9}, "variance"),
    (ddpm.ddim_step, {"alpha_bar": 1., "alpha_bar_prev": 1., "eta": 0.}, "alpha_bar must"),
    (ddpm.ddim_step, {"alpha_bar": .5, "alpha_bar_prev": 1.1, "eta": 0.}, "alpha_bar_prev must"),
    (ddpm.ddim_step, {"alpha_bar": .5, "alpha_bar_prev": .6, "eta": 1.5}, "eta must"),
    (sde.forward_sde_step, {"sde": sde.VP(), "t": -.1, "dt": .1}, "t must"),
    (sde.reverse_sde_step, {"sde": sde.VP(), "t": 1.1, "dt": .1}, "t must"),
    (sde.reverse_sde_step, {"sde": sde.VP(), "t": -.1, "dt": .1}, "t must"),
    (sde.pf_ode_step, {"sde": sde.VE(), "t": np.nan, "dt": .1}, "t must"),
    (sde.pf_ode_step, {"sde": sde.VE(), "t": np.array([.5, np.nan]), "dt": .1}, "t must"),
    (sde.forward_sde_step, {"sde": sde.SubVP(), "t": .5, "dt": 0.}, "dt must"),
    (sde.reverse_sde_step, {"sde": sde.SubVP(), "t": .5, "dt": 0.}, "dt must")], ids=named)
def test_parameters_out_of_their_range(step, parameters, words):
    with pytest.raises(ValueError, match=words):
        coefficients(step, **parameters)
    with pytest.raises(ValueError, match=words):
        Fused()(step, noise.PREDICTOR, **parameters)
    with pytest.raises(ValueError, match=words):
        samplers.Reference()(step, noise.PREDICTOR, **parameters)


@pytest.mark.parametrize("engine", [Fused(), samplers.Reference()],
                         ids=lambda engine: type(engine).__name__)
def test_the_reference_refuses_what_a_kernel_does(engine):
    chain = {"alpha_bar": .3, "alpha_bar_prev": .6, "variance": .2}
    for step, more, error, words in (
            (langevin.langevin_step, {"eps": .1, "eta": 1.}, TypeError, "no parameter 'eta'"),
            (langevin.langevin_step, {"eps": .1, "clip": (0, 1)}, ValueError, "no denoise stage"),
            (ddpm.posterior_step, chain | {"denoise": ddpm.predicted_x0, "clip": (1, -1)},
             ValueError, r"clip must be \(lo, hi\)"),
            (ddpm.posterior_step, chain | {"denoise": ddpm.predicted_x0, "alpha_bar": 1.2},
             ValueError, "alpha_bar must")):
        with pytest.raises(error, match=words):
            engine(step, noise.PREDICTOR, **more)


@pytest.mark.parametrize("f, arguments, words", [
    (sde.importance_times, (sde.VP(), 1.5), "u must"),
    (sde.importance_times, (sde.VP(), .5, 0.), "t_min must"),
    (sde.importance_times, (sde.VP(), .5, 2.), "t must"),
    (solvers.churn, (np.array([2., 1.]), -1.), "s_churn must be in"),
    (solvers.churn, (np.array([2., 1.]), np.nan), "s_churn must be in"),
    (solvers.churn, (np.array([2., 1.]), 1., 3., 2.), "s_min <= s_max"),
    (solvers.rho_levels, (5, 2., 1., -7.), "rho must"),
    (solvers.rho_levels, (5, 2., 1., np.nan), "rho must"),
    (langevin.step_sizes, ([2., 1.], -1.), "eps must"),
    (ddpm.cosine_betas, (0,), "n must"), (ddpm.cosine_betas, (10, 1.), "beta must")], ids=named)
def test_schedules_out_of_their_range(f, arguments, words):
    with pytest.raises(ValueError, match=words):
        f(*arguments)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_step_that_is_not_linear():
    for step in (lambda x, /: x**2, lambda x, s, /: x * s, lambda x, z, /: x + z + 1):
        with pytest.raises(ValueError, match="not linear in its operands"):
            apply(step, *[X] * (2 if "s" in step.__code__.co_varnames else 1))


def test_coefficients_that_are_not_finite():
    with pytest.raises(ValueError, match="alpha_bar must be smaller than alpha_bar_prev"):
        coefficients(ddpm.ddim_step, alpha_bar=.9, alpha_bar_prev=.1, eta=1.)
    with pytest.raises(ValueError, match="sigma_next must be smaller than sigma"):
        coefficients(solvers.dpmpp_2m_step, sigma_prev=2., sigma=.1, sigma_next=1.)
    with pytest.raises(ValueError, match="reverse_diffusion_step: a coefficient is not finite"):
        coefficients(sde.reverse_diffusion_step, sde=sde.VP(), i=4, n=5)  # beta / n > 1
    with pytest.raises(ValueError, match="pf_ode_step.*not finite"):
        coefficients(sde.pf_ode_step, sde=sde.VP(), t=1., dt=1e308)


# ---- parameters in any precision, ends of a process ----

@pytest.mark.parametrize("op", kernels.OPS.values(), ids=kernels.OPS)
@pytest.mark.parametrize("kind", ["float32", "float16", "longdouble", "0-d", "small integers"])
def test_parameters_of_any_kind_are_computed_in_float64(op, kind):
    """A number, a NumPy number, a 0-d array, one a sample: the coefficients are those of the same
    number in float64, and the reference's step is the one that they belong to."""
    rng, x = np.random.default_rng(5), np.linspace(-1, 1, 24).reshape(8, 3)
    u = [x + k for k in range(len(op.operands))]
    for batch in (None, 8):
        p = op.parameters(rng, batch)
        given = {name: narrow(v, kind) for name, v in p.items()}
        wide = {name: widened(v) for name, v in given.items()}
        want = op.coefficients(**wide)
        got = op.coefficients(**given)
        assert got.dtype == np.float64 and np.array_equal(got, want)
        if batch is None and op.operands:
            z = lambda shape, k, tag: noise.normal(shape, k).astype(float)
            steps = [samplers.Reference(normal=z)(op.step, 2, denoise=op.denoise, **each)
                     for each in (given, wide)]
            assert np.array_equal(steps[0](0, *u), steps[1](0, *u))
            given, wide = (apply(op, *(v.astype(np.float32) for v in u), **each)
                           for each in (given, wide))
            assert np.array_equal(given, wide)


def narrow(v, kind):
    """A parameter in fewer bits, or as a 0-d array; what is no number as it is."""
    v = np.asarray(v)
    if v.dtype.kind == "i" and kind == "small integers":
        return v.astype(np.uint8)[()]
    if v.dtype.kind == "f" and kind in ("float32", "float16", "longdouble"):
        return v.astype(kind)[()]
    return v if kind == "0-d" and v.dtype.kind in "fi" else v[()]


def widened(v):
    """The same numbers in float64 or int64; a single one as Python's."""
    if not isinstance(v, (np.generic, np.ndarray)) or v.dtype.kind not in "iuf":
        return v
    v = v.astype(float if v.dtype.kind == "f" else int)
    return v if v.ndim else v.item()


VP, TWO = sde.VP(np.float32(.1), np.float32(20.)), np.array([.3, .7], np.float32)


@pytest.mark.parametrize("f, arguments", [
    (lambda low, high: ddpm.linear_betas(10, low, high), (1e-4, .02)),
    (lambda high: ddpm.cosine_betas(10, high), (.998,)), (ddpm.alpha_bars, (TWO,)),
    (lambda high, low: langevin.noise_levels(10, high, low), (20., .1)),
    (lambda *p: solvers.rho_levels(10, *p), (80., .002, 7.1)),
    (langevin.step_sizes, (TWO[::-1], .013)),
    (lambda *p: solvers.churn(TWO[::-1], *p), (.3, .1, .9, 1.003)),
    (lambda *p: sde.importance_times(sde.VP(), *p), (TWO, 1e-4)),
    (lambda *p: sde.VE(*p).marginal(.3), (.013, 47.)), (lambda *p: sde.VE(*p).time(1.1), (.1, 9.)),
    (lambda *p: sde.VE(*p).diffusion(.3), (.013, 47.)), (sde.VE().time, (TWO,)),
    (sde.EDM().marginal, (TWO,)), (sde.EDM().time, (TWO,)), (sde.EDM().diffusion, (TWO,)),
    (lambda *p: sde.VP(*p).marginal(.3), (.13, 19.)), (sde.VP().marginal, (TWO,)),
    (lambda *p: sde.SubVP(*p).marginal(.3), (.13, 19.)), (sde.SubVP().time, (TWO,)),
    (sde.FlowMatching().marginal, (TWO,)), (sde.FlowMatching().time, (TWO,)),
    (lambda *p: targets.Gaussian([0.], 1.).noised(*p).variances, (.3, .7))], ids=str)
def test_functions_of_numbers_compute_in_float64(f, arguments):
    given = [np.float32(v) if np.ndim(v) == 0 else v for v in arguments]
    wide = [np.float64(v) if np.ndim(v) == 0 else v.astype(float) for v in given]
    together = [v if isinstance(v, tuple) else (v,) for v in (f(*given), f(*wide))]
    for got, want in zip(*together, strict=True):
        assert np.asarray(got).dtype == np.float64 and np.array_equal(got, want)


def test_levels_return_their_ends_exactly():
    rng = np.random.default_rng(0)
    for _ in range(300):
        low, high = np.exp(np.sort(rng.uniform(-7, 6, 2)))
        n = int(rng.integers(2, 60))
        for levels in (solvers.rho_levels(n, high, low, rng.uniform(1, 12)),
                       langevin.noise_levels(n, high, low)):
            assert levels[0] == high and levels[-1] == low and (np.diff(levels) < 0).all()
        betas = ddpm.linear_betas(n, low / 1e3, high / 1e3)
        assert betas[0] == low / 1e3 and betas[-1] == high / 1e3


def processes():
    """SDEs whose ends no formula meets exactly."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        low = np.exp(rng.uniform(-4, 0))
        high = low * np.exp(rng.uniform(1, 8))  # t is ln sigma over ln of that ratio
        yield from (sde.EDM(high), sde.VE(low, high), sde.VP(low / 20, 1 + high / 50),
                    sde.SubVP(low / 20, 1 + high / 50))


def ratios(process, n=9):
    """sigma / a from a process's end down, by EDM's rule."""
    a, sigma = map(float, process.marginal(process.T))
    low = getattr(process, "sigma_min", sigma / a / 50)
    return solvers.rho_levels(n, sigma / a, low)


def test_a_process_takes_its_own_levels():
    """Whether they came from our rule, or from its formula in float32 or float64; rounding above T
    or below 0 is on the end, so that no root of a negative number is taken."""
    score = lambda x, t: -x
    for process in processes():
        exact = ratios(process)
        rule = np.linspace(exact[0]**(1 / 7), exact[-1]**(1 / 7), 9)**7
        single = np.linspace(np.float32(exact[0])**np.float32(1 / 7),
                             np.float32(exact[-1])**np.float32(1 / 7), 9, dtype=np.float32)**7
        for levels in (exact, rule, single.astype(np.float32)):
            times = process.time(levels)
            for loop in (samplers.heun, samplers.reverse_sde, samplers.pf_ode):
                *_, x = loop(score, np.ones((2, 1)), process, times, samplers.Reference())
                assert np.isfinite(x).all(), process


@pytest.mark.parametrize("process", [sde.VE(), sde.VP(), sde.SubVP(), sde.FlowMatching()],
                         ids=str)
def test_a_chains_times_may_be_rounded(process):
    """An index is the whole number that its time is, but for rounding."""
    exact = np.linspace(process.T, 0, 201)
    chains = (exact, exact.astype(np.float32), exact * (1 - 1e-16),
              np.append(process.T * (1 - 1e-16), exact[1:]))
    states = [list(samplers.reverse_diffusion(lambda x, t: -x, np.ones((1, 2)), process, times,
                                            samplers.Reference()))[-1] for times in chains]
    assert all(np.array_equal(states[0], other) for other in states[1:])
    for n in (1024, 1025, 5000):  # 1 / n and SLACK are then of one size
        last = process.T / n
        for times in (n, np.append(np.linspace(process.T, last, n), 0.),
                      np.append(np.linspace(process.T, last, n), 0.).astype(np.float32)):
            next(samplers.reverse_diffusion(lambda x, t: -x, np.ones((1, 2)), process, times,
                                            samplers.Reference()))
    with pytest.raises(ValueError, match="one an index"):
        list(samplers.reverse_diffusion(lambda x, t: -x, np.ones((1, 2)), process, exact * .9998,
                                      samplers.Reference()))


def test_a_number_in_is_a_number_out():
    """So that a marginal meets tensors, and an SDE is a key."""
    for process in (sde.VE(), sde.VP(), sde.SubVP(), sde.EDM(np.array(10.)),
                    sde.FlowMatching()):
        assert hash(process)
        a, sigma = process.marginal(.5)
        assert np.ndim(process.time(.5)) == 0
        assert (a * torch.ones(2) + sigma * torch.ones(2)).shape == (2,)
    for bad in (("1", "2"), ([1.], [2.])):
        with pytest.raises(TypeError, match="must be a number or a NumPy array"):
            sde.VE(*bad)


@pytest.mark.parametrize("process", [sde.VE(), sde.VP(), sde.SubVP(), sde.EDM(80.),
                                     sde.FlowMatching()], ids=str)
def test_rounding_beyond_an_end_is_the_end(process):
    T, step = process.T, sde.reverse_sde_step
    at = lambda t: coefficients(step, sde=process, t=t, dt=.01)
    for miss in (1e-16, 1e-9, 8e-7):
        assert np.array_equal(at(T * (1 + miss)), at(T)) and np.array_equal(at(-miss * T), at(0.))
        assert np.array_equal(at(np.array([T * (1 + miss), -miss * T])), at(np.array([T, 0.])))
    for t in (T * (1 + 2e-6), -2e-6 * T, T + 1, np.nan):
        with pytest.raises(ValueError, match="t must be in"):
            at(t)
    with pytest.raises(ValueError, match=rf"t must be in \[0, {T:g}\], got {T * 1.00001}"):
        at(T * 1.00001)  # in all its digits, as five would print T


def test_rounding_beyond_other_closed_ends_is_the_end():
    ddim = lambda **p: coefficients(ddpm.ddim_step, **{"alpha_bar": .3, "alpha_bar_prev": .6,
                                                       "eta": .5} | p)
    for name in ("eta", "alpha_bar_prev"):
        assert np.array_equal(ddim(**{name: 1 + 1e-9}), ddim(**{name: 1.}))
    assert np.array_equal(ddim(eta=-1e-9), ddim(eta=0.))
    for bad in ({"eta": 1.00001}, {"alpha_bar_prev": 1.00001}, {"eta": -1e-5}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be in"):
            ddim(**bad)
    with pytest.raises(ValueError, match="i must be in"):  # a whole number is not rounded
        coefficients(sde.reverse_diffusion_step, sde=sde.VE(), i=3_000_000, n=3_000_000)
