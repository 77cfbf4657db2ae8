"""The sampling loops on the two-mode test of the SMLD paper, 1/5 N((-5,-5), I) + 4/5 N((5,5), I),
with its exact scores. Across the modes the law is a line's mixture, along them N(0, 1)."""

from functools import partial
from inspect import isgenerator
from itertools import count, islice

import numpy as np
import pytest
from scipy.stats import norm

from minidiff import ddpm, langevin, noise, sample, sde
from minidiff.affine import coefficients
from minidiff.sde import VE, VP, SubVP, prior_std
from minidiff.targets import Mixture

TARGET = Mixture([1, 4], [[-5., -5.], [5., 5.]], 1.)
ACROSS, ALONG = np.array([[1., 1.], [1., -1.]]) / 2**.5
N = {2: 2**16, 10: 2**14}  # samples in 2 and 10 dimensions

BETAS = ddpm.linear_betas(100, 1e-3, .2)
CHAIN = ddpm.alpha_bars(BETAS)
SUBSET = ddpm.alpha_bars(ddpm.linear_betas())[::10]
HUNDRED, TWO_HUNDRED = np.linspace(1, 0, 101), np.linspace(1, 0, 201)
COSINE_BETAS = ddpm.cosine_betas(100)
COSINE = ddpm.alpha_bars(COSINE_BETAS)
LEVELS = langevin.rho_levels(40, 80., .002)
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
    return lambda x, t: target(x.shape[1]).at(*sde.marginal(t)).score(x)


def at_index(alpha_bar):
    """The exact score of a discrete chain, a function of i."""
    return lambda x, i: target(x.shape[1]).at(alpha_bar[i]**.5, (1 - alpha_bar[i])**.5).score(x)


def at_chain(x, t):
    """The exact score of CHAIN, a function of the time, i = trunc(t (n - 1))."""
    return at_index(CHAIN)(x, int(t * (len(CHAIN) - 1)))


def at_sigma(x, sigma):
    """The exact score of x0 + sigma z."""
    return target(x.shape[1]).at(1., sigma).score(x)


def level(alpha_bar):
    """(a, sigma) at the noisy end of a chain."""
    return alpha_bar[-1]**.5, (1 - alpha_bar[-1])**.5


# name: loop, score, where it starts, its arguments, and bounds of its discretisation's bias: of
# the small mode's weight, of a mode's mean and variance, of a projection's distribution
# function. The bias is of first order in the step; test_oracles derives the variance's along the
# modes, which alone sets "flow, VE"; the others were measured with 2^17 ... 2^20 points and rounded
# up.
SAMPLERS = {
    "reverse SDE, VE": (sample.reverse_sde, at_time(VE()), VE().marginal(1.),
                        (VE(), TWO_HUNDRED), (.003, .015, .015, .005)),
    "reverse SDE, VP": (sample.reverse_sde, at_time(VP()), VP().marginal(1.),
                        (VP(), HUNDRED), (.002, .045, .035, .014)),
    "reverse SDE, sub-VP": (sample.reverse_sde, at_time(SubVP()), SubVP().marginal(1.),
                            (SubVP(), HUNDRED), (.002, .055, .03, .018)),
    "reverse diffusion, VE": (sample.reverse_diffusion, at_time(VE()), VE().marginal(1.),
                              (VE(), TO_1E_5), (.009, .01, .055, .013)),
    "reverse diffusion, VP": (sample.reverse_diffusion, at_chain, level(CHAIN), (VP(), 100),
                              (.01, .12, .045, .041)),
    "reverse diffusion, sub-VP": (sample.reverse_diffusion, at_time(SubVP()), SubVP().marginal(1.),
                                  (SubVP(), 100), (.003, .155, .035, .047)),
    "ancestral": (sample.ancestral, at_index(CHAIN), level(CHAIN), (BETAS,),
                  (.006, .025, .012, .007)),
    "DDIM": (sample.ddim, at_index(SUBSET), level(SUBSET), (SUBSET,), (.003, .065, .04, .008)),
    "DDIM, eta 1": (partial(sample.ddim, eta=1.), at_index(SUBSET), level(SUBSET), (SUBSET,),
                    (.007, .03, .085, .013)),
    "flow, VE": (sample.pf_ode, at_time(VE()), VE().marginal(1.), (VE(), TWO_HUNDRED),
                 (.012, .09, .18, .024)),
    "flow, VP": (sample.pf_ode, at_time(VP()), VP().marginal(1.), (VP(), HUNDRED),
                 (.003, .04, .06, .006)),
    "flow, sub-VP": (sample.pf_ode, at_time(SubVP()), SubVP().marginal(1.), (SubVP(), HUNDRED),
                     (.003, .04, .05, .006)),
}
PC = sample.predictor_corrector
SAMPLERS |= {
    "ancestral, VE": (sample.ancestral_sde, at_time(VE()), VE().marginal(1.), (VE(), TO_1E_5),
                      (.005, .025, .06, .009)),
    "ancestral, VP": (sample.ancestral_sde, at_time(VP()), VP().marginal(1.), (VP(), HUNDRED),
                      (.013, .04, .015, .02)),
    "ancestral, clipped": (partial(sample.ancestral, clip=(-9., 9.)), at_index(CHAIN),
                           level(CHAIN), (BETAS,), (.007, .035, .015, .009)),
    "ancestral, cosine": (sample.ancestral, at_index(COSINE), level(COSINE), (COSINE_BETAS,),
                          (.012, .045, .018, .013)),
    "ancestral, a subset, posterior variance": (partial(
        sample.ancestral, variances=ddpm.posterior_variances(ddpm.subset_betas(SUBSET))),
        at_index(SUBSET), level(SUBSET), (ddpm.subset_betas(SUBSET),), (.008, .035, .095, .016)),
    "Heun, VP": (sample.heun, at_time(VP()), VP().marginal(1.), (VP(), np.linspace(1, 1e-3, 51)),
                 (.003, .02, .02, .006)),
    "EDM": (sample.edm, at_sigma, (1., 80.), (LEVELS,), (.003, .015, .03, .005)),
    "EDM, churn": (partial(sample.edm, s_churn=10., s_min=.05, s_max=50.), at_sigma, (1., 80.),
                   (LEVELS,), (.003, .015, .065, .008)),
    "DPM-Solver++(2M)": (sample.dpmpp_2m, at_sigma, (1., 80.), (LEVELS,), (.003, .015, .07, .005)),
    "corrected, annealed, VE": (partial(PC, predictor=sample.reverse_diffusion,
                                        corrector="annealed"),
                                at_time(VE()), VE().marginal(1.), (VE(), TO_1E_5),
                                (.003, .015, .03, .006)),
    "corrected, annealed, VP": (partial(PC, predictor=sample.ancestral_sde, corrector="annealed"),
                                at_time(VP()), VP().marginal(1.), (VP(), HUNDRED),
                                (.01, .02, .03, .01)),
    "corrected, annealed, sub-VP": (partial(PC, corrector="annealed"), at_time(SubVP()),
                                    SubVP().marginal(1.), (SubVP(), HUNDRED),
                                    (.003, .07, .03, .022)),
}
LOOPS = {name: row[:4] for name, row in SAMPLERS.items()} | {
    "annealed Langevin": (sample.annealed_langevin, at_sigma, (1., 8.), ([8., 4., 2., 1.],))}
TWO_CALLS = ("Heun, VP", "EDM", "EDM, churn", *(n for n in LOOPS if "corrected" in n))
EVERY_LOOP = pytest.mark.parametrize("name", LOOPS)


# The SNR's rule needs norms. The batch's means take the same step for all samples; a sample's own
# norms make large steps where |s| is small: p |s|^2 is what such steps keep, (D + 2) / D wider in
# each direction for a normal of D dimensions, and here, where steps are large, more. In 2
# dimensions |s| comes near 0 and the steps explode.
CHAINS = {"VE": (sample.reverse_diffusion, VE(), TO_1E_5),
          "VP": (sample.ancestral_sde, VP(), HUNDRED),
          "sub-VP": (sample.reverse_sde, SubVP(), HUNDRED)}
CORRECTED = {(f"corrected, {corrector}, {name}", d): (
    partial(PC, predictor=CHAINS[name][0], corrector=corrector, snr=.1), at_time(CHAINS[name][1]),
    CHAINS[name][1].marginal(1.), CHAINS[name][1:], bias) for name, d, corrector, bias in (
        ("VE", 2, "batch_langevin", (.005, .02, .05, .008)),
        ("VP", 2, "batch_langevin", (.012, .03, .05, .014)),
        ("sub-VP", 2, "batch_langevin", (.004, .06, .05, .02)),
        ("VE", 10, "langevin", (.02, .02, .46, .055)),
        ("VP", 10, "langevin", (.004, .02, .28, .036)),
        ("sub-VP", 10, "langevin", (.012, .065, .32, .04)))}
ALL = {(name, d): row for name, row in SAMPLERS.items() for d in (2, 10)} | CORRECTED


@pytest.fixture(scope="module", params=ALL.items(), ids=lambda i: f"{i[0][0]}, {i[0][1]}-D")
def reached(request):
    """The last state of a sampler that starts from the exact distribution, and its bias."""
    (_, d), (loop, score, start, arguments, bias) = request.param
    x = target(d).at(*start).sample(N[d], seed=1)
    *_, x = loop(score, x, *arguments, sample.Reference(seed=1))
    return x, bias


def test_samplers_keep_the_weights_of_the_modes(reached):
    x, (bias, *_) = reached
    assert abs((x.sum(1) < 0).mean() - .2) < 4.9 * (.2 * .8 / len(x))**.5 + bias


def test_samplers_keep_the_mean_and_variance_of_each_mode(reached):
    x, (_, of_mean, of_variance, _) = reached
    across, along, _ = directions(x.shape[1])
    for side, center in ((x.sum(1) < 0, -5 * 2**.5), (x.sum(1) > 0, 5 * 2**.5)):
        n = side.sum()
        for u, mean in ((across, center), (along, 0.)):
            assert abs((x[side] @ u).mean() - mean) < 4.9 / n**.5 + of_mean
            assert abs((x[side] @ u).var() - 1) < 4.9 * (2 / n)**.5 + of_variance


def test_samplers_reach_the_projections_of_the_target(reached):
    x, (*_, bias) = reached
    p, n = target(x.shape[1]), len(x)
    ranks = np.arange(n + 1) / n
    # Dvoretzky-Kiefer-Wolfowitz at alpha 1e-6: P(sup |F_n - F| > d) <= 2 exp(-2 n d^2)
    distance = (np.log(2 / 1e-6) / (2 * n))**.5
    for u in directions(x.shape[1]):
        f = norm.cdf(np.sort(x @ u)[:, None] - p.means @ u) @ p.weights
        assert max((ranks[1:] - f).max(), (f - ranks[:-1]).max()) < distance + bias


def test_plain_langevin_keeps_the_weights_it_started_with():
    # a point crosses by a step with probability below Phi(-6.98), the modes' edge under
    # eps = .1; 2^12 points times 100 steps make 6e-7 of it
    x = Mixture([1, 1], TARGET.means, 1.).sample(2**12, seed=1)
    side = x @ ACROSS < 0
    steps = sample.iterate(langevin.langevin_step, lambda x, _: TARGET.score(x), x, range(100),
                           sample.Reference(seed=1), eps=.1)
    *_, x = steps
    np.testing.assert_array_equal(x @ ACROSS < 0, side)
    assert abs(side.mean() - .5) < 6 * .5 / 2**6


def test_annealed_langevin_recovers_the_weights():
    # The loop itself carries the exact density across the modes: its state is the density on
    # a grid, its `op` the step's normal kernel, wider than three spacings. From weights of
    # 1/2 the 200 steps end at .217, for mixing slows as the modes part; 4.9 sigma about that.
    sigmas, grid = langevin.noise_levels(20, 8., 1.), np.linspace(-51, 51, 511)
    line = Mixture([1, 4], [[-5 * 2**.5], [5 * 2**.5]], 1.)

    def densities(step, tag, **parameters):
        table = coefficients(step, **parameters)

        def move(k, density, s):
            a, b, c = table[k]
            return norm.pdf(grid[:, None], a * grid + b * s, c) @ density * .2
        return move

    *_, p = sample.annealed_langevin(lambda _, sigma: line.at(1., sigma).score(grid[:, None])[:, 0],
                                     norm.pdf(grid, scale=8.), sigmas, densities, eps=.5,
                                     n_steps=10)
    weight = .2 * (p[:255].sum() + p[255] / 2)
    assert p.sum() * .2 == pytest.approx(1, abs=1e-6)
    assert weight == pytest.approx(.2, abs=.02)
    n = 2**14
    *_, x = sample.annealed_langevin(at_sigma, sample.prior((n, 2), 8., seed=1), sigmas,
                                     sample.Reference(seed=1), eps=.5, n_steps=10)
    assert abs((x @ ACROSS < 0).mean() - weight) < 4.9 * (weight * (1 - weight) / n)**.5


@EVERY_LOOP
def test_a_shard_of_the_batch_gets_the_bits_of_the_whole(name):
    loop, score, start, arguments = LOOPS[name]
    x = TARGET.at(*start).sample(9, seed=3)
    whole = loop(score, x, *arguments, sample.Reference(seed=3))
    shard = loop(score, x[5:], *arguments, sample.Reference(seed=3, sample=5))
    for x, rows in islice(zip(whole, shard), 20):
        np.testing.assert_array_equal(x[5:], rows)


def test_the_seed_chooses_the_path():
    x, (loop, score, _, arguments) = np.ones((4, 2)), LOOPS["ancestral"]
    one, again, other = (next(loop(score, x, *arguments, sample.Reference(seed)))
                         for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).all()


@EVERY_LOOP
def test_a_loop_is_a_generator_that_computes_a_state_when_asked_for_it(name):
    loop, score, start, arguments = LOOPS[name]
    calls = []
    states = loop(lambda x, k: calls.append(k) or score(x, k), np.ones((3, 2)), *arguments,
                  sample.Reference())
    assert isgenerator(states)
    assert not calls
    next(states)
    next(states)
    assert len(calls) == (4 if name in TWO_CALLS else 2)


@pytest.mark.parametrize("loop, arguments, levels", [
    (sample.reverse_sde, (VE(), [1., .5, .2, 0.]), [1., .5, .2]),
    (sample.pf_ode, (VP(), [1., .5, .2, 0.]), [1., .5, .2]),
    (sample.reverse_diffusion, (SubVP(), 4), [1., .75, .5, .25]),
    (sample.ancestral_sde, (VE(), [1., .7, .4, 0.]), [1., .7, .4]),
    (sample.edm, ([2., 1.],), [2., 1., 1.]), (sample.dpmpp_2m, ([2., 1.],), [2., 1.]),
    (sample.heun, (VP(), [1., .5, .2]), [1., .5, .5, .2]),
    (sample.predictor_corrector, (VE(), [1., .5, 0.]), [1., .5, .5]),
    (sample.ancestral, ([.1, .2, .3],), [2, 1, 0]),
    (sample.ddim, ([.9, .5, .1],), [2, 1, 0]),
    (sample.annealed_langevin, ([2., 1.],), [2.] * 100 + [1.] * 100)])
def test_a_loop_evaluates_the_score_once_a_step_at_its_start(loop, arguments, levels):
    seen = []
    states = loop(lambda x, k: seen.append(k) or -x, np.ones((3, 2)), *arguments,
                  sample.Reference())
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
    states = loop(broken(value, score), np.ones((3, 2)), *arguments, sample.Reference())
    states = sample.check_finite(states)
    with np.errstate(invalid="ignore"), pytest.raises(FloatingPointError, match=r"step \d: the"):
        list(states)


@EVERY_LOOP
def test_without_it_a_nan_stays_in_its_own_row(name):
    loop, score, start, arguments = LOOPS[name]
    states = loop(broken(np.nan, score), np.ones((3, 2)), *arguments, sample.Reference())
    with np.errstate(invalid="ignore"):
        for k, x in enumerate(islice(states, 8)):
            assert np.isnan(x[0]).all() == (k > (0 if name in TWO_CALLS else 2))
            assert np.isfinite(x[1:]).all()


def test_the_prior_is_its_std_times_float32_noise_by_sample():
    x = sample.prior((6, 3), prior_std(VE()), seed=4)
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, np.float32(50) * sample.prior((6, 3), seed=4))
    np.testing.assert_array_equal(x[2:], sample.prior((4, 3), 50., seed=4, sample=2))


REVERSE = pytest.mark.parametrize("loop", [sample.reverse_sde, sample.pf_ode, sample.heun])


@REVERSE
@pytest.mark.parametrize("times", [[0., 1.], [1., .5, .7], [1., .5, .5], [1.], [], [[1., 0.]],
                                   [1., np.nan, 0.]])
def test_times_that_do_not_fall_are_refused(loop, times):
    with pytest.raises(ValueError, match="times"):
        next(loop(at_time(VP()), np.ones((1, 2)), VP(), times, sample.Reference()))


@REVERSE
@pytest.mark.parametrize("times", [[1.5, .5], [np.inf, .5], [0., -.1, -.2]])
def test_times_outside_the_process_are_refused(loop, times):
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\]"):
        next(loop(at_time(VP()), np.ones((1, 2)), VP(), times, sample.Reference()))


@pytest.mark.parametrize("times", [[1., 0.], [0., .5, .5], [0.], [0., np.nan]])
def test_forward_times_that_do_not_rise_are_refused(times):
    with pytest.raises(ValueError, match="times"):
        next(sample.forward_sde(np.ones((1, 2)), VP(), times, sample.Reference()))


@pytest.mark.parametrize("loop, arguments, named", [
    (sample.annealed_langevin, {"sigmas": [1., 2.]}, "sigmas"),
    (sample.annealed_langevin, {"sigmas": [2., 2.]}, "sigmas"),
    (sample.annealed_langevin, {"sigmas": [1., 0.]}, "sigmas"),
    (sample.annealed_langevin, {"sigmas": [1., np.nan]}, "sigmas"),
    (sample.annealed_langevin, {"sigmas": []}, "sigmas"),
    (sample.annealed_langevin, {"sigmas": [2., 1.], "n_steps": 0}, "n_steps"),
    (sample.annealed_langevin, {"sigmas": [2., 1.], "eps": 0.}, "eps"),
    (sample.ancestral, {"betas": [.1, 1.]}, "beta"),
    (sample.ancestral, {"betas": [0., .1]}, "beta"),
    (sample.ancestral, {"betas": [.1, np.nan]}, "beta"),
    (sample.ancestral, {"betas": [.1, .2], "variances": [.1, -.1]}, "variance"),
    (sample.ddim, {"alpha_bar": [1., .5]}, "alpha_bar"),
    (sample.ddim, {"alpha_bar": [.5, 0.]}, "alpha_bar"),
    (sample.ddim, {"alpha_bar": [.9, .5], "eta": 1.1}, "eta"),
    (sample.ddim, {"alpha_bar": [.9, .5], "eta": -.1}, "eta"),
    (sample.reverse_diffusion, {"sde": VE(), "times": 1}, "times must"),
    (sample.reverse_diffusion, {"sde": VE(), "times": 0}, "times must"),
    (sample.reverse_diffusion, {"sde": VE(), "times": [1., .9, .8, 0.]}, "times must"),
    (sample.ancestral_sde, {"sde": SubVP(), "times": 9}, "sde must be VE or VP"),
    (sample.predictor_corrector, {"sde": VE(), "times": 9, "corrector": "Langevin"}, "corrector"),
    (sample.predictor_corrector, {"sde": VP(), "times": 18}, "times: steps too long"),
    (sample.predictor_corrector, {"sde": VE(), "times": [.1, .5]}, "times must"),
    (sample.edm, {"sigmas": [1., 2.]}, "sigmas"), (sample.edm, {"sigmas": []}, "sigmas"),
    (sample.edm, {"sigmas": [2., 1.], "s_noise": 0.}, "s_noise"),
    (sample.dpmpp_2m, {"sigmas": [1., 0.]}, "sigmas"),
    (sample.dpmpp_2m, {"sigmas": [1., np.nan]}, "sigmas")])
def test_arguments_outside_their_range_are_refused_by_name(loop, arguments, named):
    with pytest.raises(ValueError, match=named):
        next(loop(at_sigma, np.ones((1, 2)), op=sample.Reference(), **arguments))


def test_a_schedule_no_kernel_could_run_is_refused():
    op, x = sample.Reference(), np.ones((1, 2))
    def score(x, level):
        return -x
    for states in (sample.ddim(score, x, [.5, .9], op), sample.ddim(score, x, [], op),
                   sample.reverse_sde(score, x, VP(), [1., -.1], op),
                   sample.pf_ode(score, x, VP(), [1., -.1], op),
                   sample.forward_sde(x, VP(), [0., 1.1], op),
                   sample.reverse_diffusion(score, x, VP(), 10, op),  # beta = 2
                   sample.ancestral(score, x, [.1, .2], op, variances=[.1]),
                   sample.ancestral(score, x, [.1, .2], op, variances=[.1, .2, .3]),
                   sample.ancestral(score, x, [], op)):
        with pytest.raises(ValueError, match="must|not finite"):
            next(states)


class Recorder:
    """An op that moves nothing and keeps (tag, eps of norms (1, 2) and (1, 1)) of corrections."""

    def __init__(self):
        self.seen = []

    def __call__(self, step, tag, **parameters):
        return lambda k, x, *u: x

    def correct(self, step, rule, x, s, k, tag):
        self.seen.append((k, tag, np.asarray(rule(np.array([1., 2.]), np.array([1., 1.])))))
        return x


@pytest.mark.parametrize("times", [np.linspace(1, 0, 101), np.linspace(1, .1, 40)**2],
                         ids=["even", "uneven"])
def test_the_correctors_step_sizes_are_algorithm_5s(times):
    """eps = 2 alpha, alpha = 2 (1 - beta(t) dt) (snr |z| / |s|)^2 for VP, without kappa for VE."""
    norms = {"langevin": np.array([1., 2.]), "batch_langevin": np.array(1.5)}
    t, dt = times[1:], -np.diff(times)
    for model, kappa in ((sde.VP(), 1 - (.1 + 19.9 * t) * dt), (sde.VE(), 1 + 0 * t)):
        for rule, ratio in norms.items():
            op = Recorder()
            list(sample.predictor_corrector(lambda x, t: x, np.ones((2, 3)), model, times, op,
                                            corrector=rule, snr=.2, n_corrector=2))
            want = [(k, noise.CORRECTOR + m) for k in np.flatnonzero(t) for m in range(2)]
            assert [(k, tag) for k, tag, _ in op.seen] == want
            for k, _, eps in op.seen:
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
        list(sample.pf_ode_adaptive(lambda x, t: x * np.nan, np.ones((2, 3)), sde.VP(), [1., .1]))


@pytest.mark.parametrize("kw", [{"snr": 0.}, {"snr": np.nan}, {"n_corrector": -1}], ids=str)
def test_a_correctors_parameters_out_of_range(kw):
    with pytest.raises(ValueError, match=next(iter(kw))):
        list(sample.predictor_corrector(lambda x, t: x, np.ones((2, 3)), sde.VP(), 100, Recorder(),
                                        **kw))


@pytest.mark.parametrize("times", [0, -3, np.nan])
def test_a_number_of_steps_out_of_range(times):
    with pytest.raises(ValueError, match="times must be"):
        list(sample.reverse_sde(lambda x, t: x, np.ones((2, 3)), sde.VP(), times, Recorder()))
