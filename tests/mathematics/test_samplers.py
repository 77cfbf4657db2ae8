"""The sampling loops on the two-mode test of the SMLD paper, 1/5 N((-5,-5), I) + 4/5 N((5,5), I),
with its exact scores. Across the modes the law is a line's mixture, along them N(0, 1)."""

from functools import cache, partial
from inspect import isgenerator
from itertools import count, islice

import numpy as np
import pytest
import torch
from scipy.stats import norm

from law import Law, excess, law, moments
from minidiff import ddpm, kernels, langevin, noise, samplers, sde, solvers
from minidiff.affine import coefficients
from minidiff.engine import Engine, at
from minidiff.sde import VE, VP, SubVP, prior_std
from minidiff.targets import Gaussian, Mixture

TARGET = Mixture([1, 4], [[-5., -5.], [5., 5.]], 1.)
ACROSS, ALONG = np.array([[1., 1.], [1., -1.]]) / 2**.5
N = 2**14  # samples

BETAS = ddpm.linear_betas(100, 1e-3, .2)
CHAIN = ddpm.alpha_bars(BETAS)
SUBSET = ddpm.alpha_bars(ddpm.linear_betas())[::10]
HUNDRED, TWO_HUNDRED = np.linspace(1, 0, 101), np.linspace(1, 0, 201)
COSINE_BETAS = ddpm.cosine_betas(100)
COSINE = ddpm.alpha_bars(COSINE_BETAS)
LEVELS = solvers.rho_levels(40, 80., .002)
TO_1E_5 = np.append(np.linspace(1, 1e-5, 200), 0.)


def target(d):
    """The same two modes in d dimensions, as far apart: across them the law of a line."""
    return Mixture([1, 4], np.outer([-1, 1], np.full(d, 5 * (2 / d)**.5)), 1.)


def directions(d):
    """Across the modes, along them, and an axis, unit vectors of d dimensions."""
    axis = np.eye(d)[0]
    return np.full(d, d**-.5), (axis - np.eye(d)[1]) / 2**.5, axis


def at_time(sde):
    """The exact score of a continuous process, a function of t."""
    return lambda x, t: target(x.shape[1]).noised(*sde.marginal(t)).score(x)


def at_sigma(x, sigma):
    """The exact score of x0 + sigma z."""
    return target(x.shape[1]).noised(1., sigma).score(x)


def process(loop, sde, times, *bias):
    """A row of SAMPLERS in continuous time."""
    return loop, at_time(sde), sde.marginal(1.), (sde, times), bias


def chain(loop, alpha_bar, argument, *bias):
    """A row of SAMPLERS in discrete time, score(x, i)."""
    level = np.stack((alpha_bar**.5, (1 - alpha_bar)**.5), 1)
    score = lambda x, i: target(x.shape[1]).noised(*level[i]).score(x)
    return loop, score, level[-1], (argument,), bias


def corrected(name, corrector, *bias, **kw):
    predictor, *of = {"VE": (samplers.reverse_diffusion, VE(), TO_1E_5),
                      "VP": (samplers.ancestral_sde, VP(), HUNDRED),
                      "sub-VP": (samplers.reverse_sde, SubVP(), HUNDRED)}[name]
    return process(partial(samplers.predictor_corrector, predictor=predictor, corrector=corrector,
                           **kw), *of, *bias)


# name: loop, score, where it starts, its arguments, and the bias of its discretisation: of the
# small mode's weight, of a mode's mean and variance, of a projection's distribution function.
SAMPLERS = {
    "reverse SDE, VE": process(samplers.reverse_sde, VE(), TWO_HUNDRED, .002, .011, .0067, .0027),
    "reverse SDE, VP": process(samplers.reverse_sde, VP(), HUNDRED, .0011, .042, .023, .013),
    "reverse SDE, sub-VP": process(samplers.reverse_sde, SubVP(), HUNDRED, .0013, .047, .025, .015),
    "reverse diffusion, VE": process(
        samplers.reverse_diffusion, VE(), TO_1E_5, .0078, .0056, .049, .011),
    "reverse diffusion, VP": chain(lambda score, x, n, engine: samplers.reverse_diffusion(
        lambda x, t: score(x, int(99 * t)), x, VP(), n, engine),
        CHAIN, 100, .0094, .11, .037, .039),
    "reverse diffusion, sub-VP": process(
        samplers.reverse_diffusion, SubVP(), 100, .0017, .15, .026, .044),
    "ancestral": chain(samplers.ancestral, CHAIN, BETAS, .0058, .025, .01, .0063),
    "DDIM": chain(samplers.ddim, SUBSET, SUBSET, .002, .056, .036, .005),
    "DDIM, eta 1": chain(partial(samplers.ddim, eta=1.), SUBSET, SUBSET, .0059, .024, .078, .011),
    "flow, VE": process(samplers.pf_ode, VE(), TWO_HUNDRED, .011, .086, .18, .023),
    "flow, VP": process(samplers.pf_ode, VP(), HUNDRED, .0014, .034, .05, .0038),
    "flow, sub-VP": process(samplers.pf_ode, SubVP(), HUNDRED, .0015, .034, .052, .0037),
    "ancestral, VE": process(samplers.ancestral_sde, VE(), TO_1E_5, .0041, .017, .042, .0061),
    "ancestral, VP": process(samplers.ancestral_sde, VP(), HUNDRED, .011, .028, .012, .016),
    "ancestral, clipped": chain(partial(samplers.ancestral, clip=(-9., 9.)), CHAIN, BETAS,
                                .0058, .025, .01, .0063),
    "ancestral, cosine": chain(samplers.ancestral, COSINE, COSINE_BETAS, .0099, .035, .0089, .01),
    "ancestral, a subset, posterior variance": chain(partial(
        samplers.ancestral, variances=ddpm.posterior_variances(ddpm.subset_betas(SUBSET))),
        SUBSET, ddpm.subset_betas(SUBSET), .0059, .024, .078, .011),
    "Heun, VP": process(samplers.heun, VP(), np.linspace(1, 1e-3, 51), 0., .0079, .011, .001),
    "EDM": (samplers.edm, at_sigma, (1., 80.), (LEVELS,), (.0002, .011, .021, .0019)),
    "EDM, churn": (partial(samplers.edm, s_churn=10., s_min=.05, s_max=50.), at_sigma, (1., 80.),
                   (LEVELS,), (0., .013, .051, .0055)),
    "DPM-Solver++(2M)": (samplers.dpmpp_2m, at_sigma, (1., 80.), (LEVELS,),
                         (.0002, .0066, .058, .0022)),
    "corrected, annealed, VE": corrected("VE", "annealed", .0043, .0019, .017, .0055),
    "corrected, annealed, VP": corrected("VP", "annealed", .0082, .0049, .0059, .0082),
    "corrected, annealed, sub-VP": corrected("sub-VP", "annealed", .0008, .058, .012, .018),
}
LOOPS = {name: row[:4] for name, row in SAMPLERS.items()} | {
    "annealed Langevin": (samplers.annealed_langevin, at_sigma, (1., 8.), ([8., 4., 2., 1.],))}
# apart: it takes no engine and one step size for the whole batch, so the tests a row do not hold
SAMPLERS["flow, adaptive"] = process(
    lambda score, x, sde, times, engine: samplers.pf_ode_adaptive(score, x, sde, times, 1e-7, 1e-7),
    VP(), [1., 1e-5], 0., 0., 0., 0.)
TWO_CALLS = ("Heun, VP", "EDM", "EDM, churn", *(n for n in LOOPS if "corrected" in n))
EVERY_LOOP = pytest.mark.parametrize("name", LOOPS)


# The SNR's rule takes norms of all coordinates, so no line has a law of its own: these are bounds,
# measured with 2^17 ... 2^20 points and rounded up. The batch's means take the same step for
# all samples; a sample's own norms make large steps where |s| is small, and a step size that
# follows the step's own |z|: what such steps keep is |s|^2 p^(D / (D + 2)), whose variance is
# (1 + 2 / D)^2 for N(0, I), see test_a_corrector_by_own_norms. In 2 dimensions |s| comes near 0 and
# the steps explode.
CORRECTED = {(f"corrected, {corrector}, {name}", d): corrected(name, corrector, *bias, snr=.1)
             for name, d, corrector, *bias in (
                 ("VE", 2, "batch_langevin", .005, .02, .05, .008),
                 ("VP", 2, "batch_langevin", .012, .03, .05, .014),
                 ("sub-VP", 2, "batch_langevin", .004, .06, .05, .02),
                 ("VE", 10, "langevin", .02, .02, .46, .055),
                 ("VP", 10, "langevin", .004, .02, .28, .036),
                 ("sub-VP", 10, "langevin", .012, .065, .32, .04))}
ALL = {(name, d): row for name, row in SAMPLERS.items() for d in (2, 10)} | CORRECTED


@pytest.mark.parametrize("D", [5, 10])
def test_a_corrector_by_own_norms_keeps_s_squared_times_a_power_of_p(D):
    """On N(0, I) |s|^2 p^(D / (D + 2)) has the variance (1 + 2 / D)^2.

    |x|^2 then is a gamma variable of shape (D + 2) / 2 and mean (D + 2)^2 / D, so that its mean
    over 2^13 chains is right to 6 sqrt(2 / (D + 2)) / 2^6.5 = .036 of itself. A step eps is about
    4 snr^2 |z|^2 / |s|^2 = .02 at snr .1: 800 forget the start, exp(-800 eps / 2) = 3e-4, and are
    of first order, some eps / 2 too wide. With p |s|^2 it would be 1 + 2 / D, .17 and more off.
    """
    rule = partial(solvers.snr_step_size, snr=.1)
    correct = kernels.Fused(seed=1).corrector(langevin.langevin_step, rule, noise.CORRECTOR)
    x = np.ascontiguousarray(noise.normal((2**13, D), seed=2))
    for k in range(800):
        x = correct(k, x, -x)
    assert (x.astype(float)**2).mean() == pytest.approx((1 + 2 / D)**2, rel=.036 + .015)


@cache
def lines(name):
    """The laws of a sampler's last state, or of the target, across the modes and along them. The
    score across them is a line's, any other way a normal's, and a step acts on each coordinate
    alone: so both are independent, and the same in all dimensions."""
    loop, score, start, arguments, *_ = SAMPLERS.get(name, (
        lambda _, x, engine: [x], None, (1., 0.), ()))
    return [law(u, loop, score, TARGET.noised(*start), arguments) for u in (ACROSS, ALONG)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_law_of_a_sampler_is_as_far_from_the_target_as_stated(name):
    (t, w), along = lines(name)
    modes = (t[t < 0], w[t < 0]), (t[t > 0], w[t > 0]), along
    mean, v, _ = np.transpose([moments(*mode) for mode in modes])
    gap = [np.cumsum(w) - w / 2 - norm.cdf(t[:, None], TARGET.means @ u) @ TARGET.weights
           for u, (t, w) in zip((ACROSS, ALONG), lines(name))]
    bias = w[t < 0].sum() - .2, mean - [-50**.5, 50**.5, 0], v - 1, np.concatenate(gap)
    np.testing.assert_allclose([abs(b).max() for b in bias], SAMPLERS[name][4], rtol=.05, atol=5e-5)


@pytest.fixture(scope="module", params=ALL.items(), ids=lambda i: f"{i[0][0]}, {i[0][1]}-D")
def reached(request):
    """The last state of a sampler that starts from the exact distribution; its law across the
    modes, along them, on an axis, as (nodes, weights); and what they may differ by beyond
    chance: nothing but for CORRECTED, whose law is the target's."""
    (name, d), (loop, score, start, arguments, bias) = request.param
    x = target(d).noised(*start).sample(N, seed=1)
    def fast(shape, k, tag):  # the contract's noise, by a kernel
        return kernels.normal(shape, seed=1, step=k, tag=tag)
    *_, x = loop(score, x, *arguments, samplers.Reference(normal=fast))
    (t, w), along = lines(name)
    axis, mean = Law(np.ones(1), w), t[:, None] / d**.5
    t_axis = axis.spread(mean, mean + ((1 - 1 / d) * moments(*along)[1])**.5)[:, 0]
    return x, ((t, w), along, (t_axis, axis.w)), (0,) * 4 if name in SAMPLERS else bias


def test_samplers_keep_the_weight_mean_and_variance_of_each_mode(reached):
    x, ((t, w), on_along, _), (of_weight, of_mean, of_variance, _) = reached
    across, along, _ = directions(x.shape[1])
    for side, own in ((x.sum(1) < 0, t < 0), (x.sum(1) > 0, t > 0)):
        p = w[own].sum()
        assert abs(side.mean() - p) < 4.9 * (p * (1 - p) / len(x))**.5 + of_weight
        for u, on_u in ((across, (t[own], w[own])), (along, on_along)):
            y, (mean, v, v_of_v) = x[side] @ u, moments(*on_u)
            assert abs(y.mean() - mean) < 4.9 * (v / len(y))**.5 + of_mean
            assert abs(y.var() - v) < 4.9 * (v_of_v / len(y))**.5 + of_variance


def test_samplers_reach_the_projections_of_the_target(reached):
    x, laws, (*_, bias) = reached
    for u, (t, w) in zip(directions(x.shape[1]), laws):
        assert excess(x @ u, t, w) < bias


def test_a_clip_of_the_prediction():
    # It acts on coordinates, in two dimensions 4 standard deviations off: where it acts, only one
    # dimension has a law on a line. The last noise, .032, spreads .8 P(z > 9 - 50^.5) at the clip.
    loop, score, start, arguments, _ = SAMPLERS["ancestral, clipped"]
    loop, p = partial(loop, last_noise=True), target(1).noised(*start)
    t, w = law(np.ones(1), loop, score, p, arguments)
    assert .02 < w[t > 8.9].sum() < .03 and w[t > 9.3].sum() < 1e-12
    *_, x = loop(score, p.sample(2**16, seed=1), *arguments, samplers.Reference(seed=1))
    assert excess(x[:, 0], t, w) < 0


def test_plain_langevin_keeps_the_weights_it_started_with():
    # a point crosses by a step with probability below Phi(-6.98), the modes' edge under
    # eps = .1; 2^12 points times 100 steps make 6e-7 of it
    x = Mixture([1, 1], TARGET.means, 1.).sample(2**12, seed=1)
    side = x @ ACROSS < 0
    *_, x = samplers.langevin(TARGET.score, x, 100, samplers.Reference(seed=1), eps=.1)
    np.testing.assert_array_equal(x @ ACROSS < 0, side)
    assert abs(side.mean() - .5) < 6 * .5 / 2**6


def test_annealed_langevin_recovers_the_weights():
    # From weights of 1/2 the 200 steps end at .217, for mixing slows as the modes part
    sigmas = langevin.noise_levels(20, 8., 1.)
    loop = partial(samplers.annealed_langevin, eps=.5, n_steps=10)
    start = Gaussian([0., 0.], 8.**2)
    t, w = law(ACROSS, loop, at_sigma, start, (sigmas,))
    assert w[t < 0].sum() == pytest.approx(.2169, abs=5e-5)
    on_along = law(ALONG, loop, at_sigma, start, (sigmas,))
    for d in (2, 10):
        across, along, _ = directions(d)
        x = samplers.prior((N, d), 8., seed=1)
        *_, x = loop(at_sigma, x, sigmas, samplers.Reference(seed=1))
        assert excess(x @ across, t, w) < 0
        assert excess(x @ along, *on_along) < 0


@EVERY_LOOP
def test_a_shard_of_the_batch_gets_the_bits_of_the_whole(name):
    loop, score, start, arguments = LOOPS[name]
    x = TARGET.noised(*start).sample(9, seed=3)
    whole = loop(score, x, *arguments, samplers.Reference(seed=3))
    shard = loop(score, x[5:], *arguments, samplers.Reference(seed=3, sample=5))
    for x, rows in islice(zip(whole, shard), 20):
        np.testing.assert_array_equal(x[5:], rows)


def test_the_seed_chooses_the_path():
    x, (loop, score, _, arguments) = np.ones((4, 2)), LOOPS["ancestral"]
    one, again, other = (next(loop(score, x, *arguments, samplers.Reference(seed)))
                         for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).all()


@EVERY_LOOP
def test_a_loop_is_a_generator_that_computes_a_state_when_asked_for_it(name):
    loop, score, start, arguments = LOOPS[name]
    calls = []
    states = loop(lambda x, k: calls.append(k) or score(x, k), np.ones((3, 2)), *arguments,
                  samplers.Reference())
    assert isgenerator(states)
    assert not calls
    next(states)
    next(states)
    assert len(calls) == (4 if name in TWO_CALLS else 2)


@pytest.mark.parametrize("loop, arguments, levels", [
    (samplers.reverse_sde, (VE(), [1., .5, .2, 0.]), [1., .5, .2]),
    (samplers.pf_ode, (VP(), [1., .5, .2, 0.]), [1., .5, .2]),
    (samplers.reverse_diffusion, (SubVP(), 4), [1., .75, .5, .25]),
    (samplers.ancestral_sde, (VE(), [1., .7, .4, 0.]), [1., .7, .4]),
    (samplers.edm, ([2., 1.],), [2., 1., 1.]), (samplers.dpmpp_2m, ([2., 1.],), [2., 1.]),
    (samplers.heun, (VP(), [1., .5, .2]), [1., .5, .5, .2]),
    (samplers.predictor_corrector, (VE(), [1., .5, 0.]), [1., .5, .5, 0.]),  # sigma(0) is sigma_min
    (samplers.predictor_corrector, (SubVP(), [1., .5, 0.]), [1., .5, .5]),
    (samplers.ancestral, ([.1, .2, .3],), [2, 1, 0]),
    (samplers.ddim, ([.9, .5, .1],), [2, 1, 0]),
    (samplers.annealed_langevin, ([2., 1.],), [2.] * 100 + [1.] * 100)])
def test_a_loop_evaluates_the_score_once_a_step_at_its_start(loop, arguments, levels):
    seen = []
    states = loop(lambda x, k: seen.append(k) or -x, np.ones((3, 2)), *arguments,
                  samplers.Reference())
    steps = len(list(states))
    assert seen == levels and steps <= len(levels)


def broken(value, score):
    """A score whose first row is `value` at its fourth call."""
    calls = count()

    def s(x, k):
        s = np.array(score(x, k))
        s[0] = value if next(calls) == 3 else s[0]
        return s
    return s


@EVERY_LOOP
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_check_finite_names_the_step_that_broke(name, value):
    value = np.nan if "clipped" in name else value  # a clip ends what is infinite
    loop, score, start, arguments = LOOPS[name]
    states = loop(broken(value, score), np.ones((3, 2)), *arguments, samplers.Reference())
    states = samplers.check_finite(states)
    with np.errstate(invalid="ignore"), pytest.raises(FloatingPointError, match=r"step \d: the"):
        list(states)


@EVERY_LOOP
def test_without_it_a_nan_stays_in_its_own_row(name):
    loop, score, start, arguments = LOOPS[name]
    states = loop(broken(np.nan, score), np.ones((3, 2)), *arguments, samplers.Reference())
    with np.errstate(invalid="ignore"):
        for k, x in enumerate(islice(states, 8)):
            assert np.isnan(x[0]).all() == (k > (0 if name in TWO_CALLS else 2))
            assert np.isfinite(x[1:]).all()


def test_the_prior_is_its_std_times_float32_noise_by_sample():
    x = samplers.prior((6, 3), prior_std(VE()), seed=4)
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, np.float32(50) * samplers.prior((6, 3), seed=4))
    np.testing.assert_array_equal(x[2:], samplers.prior((4, 3), 50., seed=4, sample=2))


REVERSE = pytest.mark.parametrize("loop", [samplers.reverse_sde, samplers.pf_ode, samplers.heun])


@REVERSE
@pytest.mark.parametrize("times", [[0., 1.], [1., .5, .7], [1., .5, .5], [1.], [], [[1., 0.]],
                                   [1., np.nan, 0.], [np.inf, .5]])
def test_times_that_do_not_fall_are_refused(loop, times):
    with pytest.raises(ValueError, match="times"):
        next(loop(at_time(VP()), np.ones((1, 2)), VP(), times, samplers.Reference()))


@REVERSE
@pytest.mark.parametrize("times", [[1.5, .5], [0., -.1, -.2]])
def test_times_outside_the_process_are_refused(loop, times):
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\]"):
        next(loop(at_time(VP()), np.ones((1, 2)), VP(), times, samplers.Reference()))


@pytest.mark.parametrize("times", [[1., 0.], [0., .5, .5], [0.], [0., np.nan]])
def test_forward_times_that_do_not_rise_are_refused(times):
    with pytest.raises(ValueError, match="times"):
        next(samplers.forward_sde(np.ones((1, 2)), VP(), times, samplers.Reference()))


@EVERY_LOOP
def test_a_score_of_another_shape_is_refused_though_it_would_broadcast(name):
    loop, score, start, arguments = LOOPS[name]
    for s in (np.ones((3, 1)), np.ones(2), 1.):
        states = loop(lambda x, k, s=s: s, np.ones((3, 2)), *arguments, samplers.Reference())
        with pytest.raises(ValueError, match=r"score has shape \(.*\), not \(3, 2\)"):
            list(states)


def test_a_score_of_another_shape_is_refused_by_the_adaptive_flow():
    for s in (np.ones((3, 1)), np.ones(2), 1.):
        with pytest.raises(ValueError, match="score has shape"):
            list(samplers.pf_ode_adaptive(lambda x, t, s=s: s, np.ones((3, 2)), VP(), [1., .1]))


@pytest.mark.parametrize("corrector", ["langevin", "batch_langevin", "annealed"])
def test_shapes_are_held_to_where_a_state_is_corrected(corrector):
    """A score that is wrong at the corrector's call alone; noise of one's own."""
    def run(score=lambda x, t: -x, normal=None):
        engine = samplers.Reference(normal=normal)
        return list(samplers.predictor_corrector(score, np.ones((3, 2)), VE(), 9, engine,
                                                 corrector=corrector))
    calls = count()
    with pytest.raises(ValueError, match="score has shape"):
        run(lambda x, t: -x if next(calls) % 2 == 0 else -x[:, :1])
    with pytest.raises(ValueError, match=r"z has shape \(3, 1\), not \(3, 2\)"):
        run(normal=lambda shape, k, tag: np.ones((3, 1)) if tag >= noise.CORRECTOR
            else np.ones(shape))
    with pytest.raises(ValueError, match=r"z has shape \(\), not \(3, 2\)"):
        run(normal=lambda *_: 1.)


def test_tensors_are_for_the_kernels():
    x = torch.ones((3, 2))
    with pytest.raises(TypeError, match="NumPy array; kernels.Fused"):
        next(samplers.reverse_sde(lambda x, t: -x, x, VP(), 9, samplers.Reference()))


def test_a_parameter_is_one_or_one_a_level():
    for eps in (np.ones(3), np.ones(9), np.ones((5, 1))):
        with pytest.raises(ValueError, match="eps .* must be one, or one of 5 levels"):
            next(samplers.iterate(langevin.langevin_step, at_sigma, np.ones((1, 2)), np.ones(5),
                                samplers.Reference(), eps=eps))


@pytest.mark.parametrize("loop, arguments, named", [
    (samplers.ancestral, {"betas": [[.1, .2]]}, "betas"),
    (samplers.ancestral, {"betas": .1}, "betas"),
    (samplers.annealed_langevin, {"sigmas": [np.inf, 1.]}, "sigmas"),
    (samplers.annealed_langevin, {"sigmas": [1., 2.]}, "sigmas"),
    (samplers.annealed_langevin, {"sigmas": [2., 2.]}, "sigmas"),
    (samplers.annealed_langevin, {"sigmas": [1., 0.]}, "sigmas"),
    (samplers.annealed_langevin, {"sigmas": [1., np.nan]}, "sigmas"),
    (samplers.annealed_langevin, {"sigmas": []}, "sigmas"),
    (samplers.annealed_langevin, {"sigmas": [2., 1.], "n_steps": 0}, "n_steps"),
    (samplers.annealed_langevin, {"sigmas": [2., 1.], "n_steps": 1.5}, "n_steps must be a whole"),
    (samplers.annealed_langevin, {"sigmas": [2., 1.], "eps": 0.}, "eps"),
    (samplers.ancestral, {"betas": [.1, 1.]}, "beta"),
    (samplers.ancestral, {"betas": [0., .1]}, "beta"),
    (samplers.ancestral, {"betas": [.1, np.nan]}, "beta"),
    (samplers.ancestral, {"betas": [.1, .2], "variances": [.1, -.1]}, "variance"),
    (samplers.ancestral, {"betas": [.1, .2], "variances": [-.1, .1]}, "variance"),
    (samplers.ddim, {"alpha_bar": [1., .5]}, "alpha_bar"),
    (samplers.ddim, {"alpha_bar": [.5, 0.]}, "alpha_bar"),
    (samplers.ddim, {"alpha_bar": [.9, .5], "eta": 1.1}, "eta"),
    (samplers.ddim, {"alpha_bar": [.9, .5], "eta": -.1}, "eta"),
    (samplers.reverse_diffusion, {"sde": VE(), "times": 1}, "times must"),
    (samplers.reverse_diffusion, {"sde": VE(), "times": 0}, "times must"),
    (samplers.reverse_diffusion, {"sde": VE(), "times": [1., .9, .8, 0.]}, "times must"),
    (samplers.ancestral_sde, {"sde": SubVP(), "times": 9}, "sde must be VE or VP"),
    (samplers.predictor_corrector, {"sde": VE(), "times": 9, "corrector": "Langevin"}, "corrector"),
    (samplers.predictor_corrector, {"sde": VP(), "times": 18}, "times: steps too long"),
    (samplers.predictor_corrector, {"sde": VE(), "times": [.1, .5]}, "times must"),
    (samplers.edm, {"sigmas": [1., 2.]}, "sigmas"), (samplers.edm, {"sigmas": []}, "sigmas"),
    (samplers.edm, {"sigmas": [2., 1.], "s_noise": 0.}, "s_noise"),
    (samplers.dpmpp_2m, {"sigmas": [1., 0.]}, "sigmas"),
    (samplers.dpmpp_2m, {"sigmas": [1., np.nan]}, "sigmas")])
def test_arguments_outside_their_range_are_refused_by_name(loop, arguments, named):
    with pytest.raises(ValueError, match=named):
        next(loop(at_sigma, np.ones((1, 2)), engine=samplers.Reference(), **arguments))


def test_a_schedule_no_kernel_could_run_is_refused():
    engine, x = samplers.Reference(), np.ones((1, 2))
    def score(x, level):
        return -x
    for states in (samplers.ddim(score, x, [.5, .9], engine), samplers.ddim(score, x, [], engine),
                   samplers.reverse_sde(score, x, VP(), [1., -.1], engine),
                   samplers.pf_ode(score, x, VP(), [1., -.1], engine),
                   samplers.forward_sde(x, VP(), [0., 1.1], engine),
                   samplers.reverse_diffusion(score, x, VP(), 10, engine),  # beta = 2
                   samplers.ancestral(score, x, [.1, .2], engine, variances=[.1]),
                   samplers.ancestral(score, x, [.1, .2], engine, variances=[.1, .2, .3]),
                   samplers.ancestral(score, x, [], engine)):
        with pytest.raises(ValueError, match="must|not finite|variances has"):
            next(states)


class Recorder(Engine):
    """An engine that moves nothing and keeps (tag, eps of norms (1, 2) and (1, 1)) of
    corrections."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __call__(self, step, tag, steps, **parameters):
        return lambda k, x, *u: x

    def corrector(self, step, rule, tag, steps, **parameters):
        def correct(k, x, s):
            eps = rule(np.array([1., 2.]), np.array([1., 1.]), **at(k, parameters))
            self.seen.append((k, tag, np.asarray(eps)))
            return x
        return correct


def test_each_correction_has_a_score_of_its_own():
    """Corrections add 1 here and predictions nothing: each score is of the state just reached."""
    engine, seen = Recorder(), []
    engine.corrector = lambda *step, **parameters: lambda k, x, s: x + 1

    def score(x, t):
        seen.append((x[0, 0], t))
        return x
    list(samplers.predictor_corrector(score, np.ones((2, 3)), sde.VE(), [1., .5, .2, 0.], engine,
                                    n_corrector=2))
    assert seen == [(1, 1.), (1, .5), (2, .5), (3, .5), (3, .2), (4, .2), (5, .2), (5, 0.), (6, 0.)]


def test_rounding_at_the_end_changes_no_number_of_corrections():
    """VE's own levels end where t is 0, or by rounding a little beside it."""
    for end in (0., 1e-17, -1e-17):
        seen = []
        score = lambda x, t, seen=seen: seen.append(t) or -x
        list(samplers.predictor_corrector(score, np.ones((2, 3)), VE(), [1., .5, end],
                                        samplers.Reference()))
        assert len(seen) == 4


@pytest.mark.parametrize("times", [np.linspace(1, 0, 101), np.linspace(1, .1, 40)**2],
                         ids=["even", "uneven"])
def test_the_correctors_step_sizes_are_algorithm_5s(times):
    """eps = 2 alpha, alpha = 2 (1 - beta(t) dt) (snr |z| / |s|)^2 for VP, without kappa for VE."""
    norms = {"langevin": np.array([1., 2.]), "batch_langevin": np.array(1.5)}
    t, dt = times[1:], -np.diff(times)
    for model, kappa in ((sde.VP(), 1 - (.1 + 19.9 * t) * dt), (sde.VE(), 1 + 0 * t)):
        for rule, ratio in norms.items():
            engine = Recorder()
            list(samplers.predictor_corrector(lambda x, t: x, np.ones((2, 3)), model, times, engine,
                                            corrector=rule, snr=.2, n_corrector=2))
            want = [(k, noise.CORRECTOR + m)
                    for k in np.flatnonzero(model.marginal(t)[1]) for m in range(2)]
            assert [(k, tag) for k, tag, _ in engine.seen] == want
            for k, _, eps in engine.seen:
                np.testing.assert_allclose(eps, 4 * kappa[k] * (.2 * ratio)**2, rtol=1e-12)


def test_vps_chain_is_ddpms_and_cosine_betas_are_iddpms():
    betas, n = ddpm.linear_betas(), 1000
    got = coefficients(sde.ancestral_step, sde=sde.VP(), i=np.arange(n), n=n)
    want = coefficients(ddpm.ancestral_step, beta=betas, variance=betas)
    np.testing.assert_allclose(got, want, rtol=1e-13)
    f = np.cos((np.arange(n + 1) / n + .008) / 1.008 * np.pi / 2)**2
    np.testing.assert_allclose(ddpm.cosine_betas(n), np.minimum(1 - f[1:] / f[:-1], .999),
                               rtol=1e-9)


def test_a_velocity_that_is_not_finite_ends_rk45():
    with pytest.raises(FloatingPointError, match="not finite at t = 1"):
        list(samplers.pf_ode_adaptive(lambda x, t: x * np.nan, np.ones((2, 3)), sde.VP(), [1., .1]))


@pytest.mark.parametrize("kw", [{"snr": 0.}, {"snr": np.nan}, {"n_corrector": -1},
                                {"n_corrector": 1.5}], ids=str)
def test_a_correctors_parameters_out_of_range(kw):
    with pytest.raises(ValueError, match=next(iter(kw))):
        list(samplers.predictor_corrector(lambda x, t: x, np.ones((2, 3)), sde.VP(), 100,
                                          Recorder(), **kw))


@pytest.mark.parametrize("times", [0, -3, 2.5, np.nan, np.inf])
def test_a_number_of_steps_out_of_range(times):
    with pytest.raises(ValueError, match="times must be"):
        list(samplers.reverse_sde(lambda x, t: x, np.ones((2, 3)), sde.VP(), times, Recorder()))
