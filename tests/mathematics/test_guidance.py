"""Conditions: guided scores, and what is known of a sample, against closed forms."""

import numpy as np
import pytest

from law import excess, law, linear_law, moments
from minidiff import data, engine, kernels, noise, samplers, sde
from minidiff.affine import coefficients, operands
from minidiff.families import FAMILIES
from minidiff.guidance import (
    Guided,
    definite,
    guide,
    guided,
    guided_step,
    posterior,
    replaced,
)
from minidiff.samplers import Reference
from minidiff.solvers import rho_levels
from minidiff.targets import Gaussian, Mixture

ONE_SCORE = [op for op in kernels.OPS.values()
             if operands(op.step) in (("x", "s"), ("x", "s", "z")) and not op.denoise]
ENGINES = [Reference, lambda seed: kernels.Fused(seed, backend="numpy"),
           lambda seed: kernels.Fused(seed, backend="host")]
BLURRED = Gaussian([0., 0.], 4.)
NARROW = Gaussian([1., -1.], 4.)


def score_of(data):
    return lambda x, sigma: data.noised(1, sigma).score(x).astype(x.dtype)


def never(x, sigma):
    raise AssertionError("this score has no weight")


# ---- classifier-free guidance ----

@pytest.mark.parametrize("w", [-1., 0., .25, 1., 3.])
def test_the_guided_score_is_on_the_line_through_both(w):
    """By unit vectors: 1 - w and w, which add up to 1. So equal scores stay what they are."""
    np.testing.assert_array_equal(coefficients(guided, w=w), [1 - w, w])


@pytest.mark.parametrize("op", ONE_SCORE, ids=lambda op: op.name)
def test_a_guided_step_is_the_step_by_the_guided_score(op):
    """Its coefficients: s has shared its own between s and s_y, the others are the step's."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        parameters = op.parameters(rng)
        w = rng.uniform(-2, 5)
        a, b, *c = coefficients(op.step, **parameters)
        found = coefficients(guided_step(op.step), w=w, **parameters)
        # each is some ten operations on numbers that are at most |a| + (1 + |w|) |b| large
        largest = abs(a) + (1 + abs(w)) * abs(b)
        np.testing.assert_allclose(found, [a, (1 - w) * b, w * b, *c],
                                   rtol=0, atol=20 * 2**-53 * largest)
    assert operands(guided_step(op.step)) == ("x", "s", "s_y", "z")[:3 + len(c)]


@pytest.mark.parametrize("make", ENGINES, ids=["reference", "numpy", "host"])
@pytest.mark.parametrize("family", FAMILIES)
def test_at_0_and_1_it_is_the_sampler_of_one_score_bit_for_bit(family, make):
    """The other score is not asked at all: no NaN of it can leak, and no -0."""
    z = noise.normal((3, 2))
    for w, scores in ((0, (score_of(BLURRED), never)), (1, (never, score_of(NARROW)))):
        own = scores[w]
        *_, want = FAMILIES[family](own, z, 12, make(0))
        score, engine = guide(*scores, w, make(0))
        *_, found = FAMILIES[family](score, z, 12, engine)
        assert score is own and (found == want).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_follows_the_guided_score(family):
    """As it follows a function that returns it whole; in float64 but for rounding."""
    z = noise.normal((3, 2)).astype(float)
    s, s_y, w = score_of(BLURRED), score_of(NARROW), 2.5

    def whole(x, sigma):
        return guided(s(x, sigma), s_y(x, sigma), w)
    *_, want = FAMILIES[family](whole, z, 12, Reference(0))
    score, engine = guide(s, s_y, w, Reference(0))
    *_, found = FAMILIES[family](score, z, 12, engine)
    # RK45 may choose another step where rounding differs; it is held to its own tolerance
    atol = 1e-2 if family == "pf_ode_adaptive" else 1e-11
    np.testing.assert_allclose(found, want, rtol=0, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_guided_family_has_the_same_bits_on_every_backend(family):
    """Fused: where a step has one score, the composite is its only update."""
    z = noise.normal((5, 3))
    data = Gaussian([1., -1., 0.], 4.)
    found = []
    for backend in ("numpy", "torch", "host"):
        s = score_of(Gaussian([0.] * 3, 4.))
        score, engine = guide(s, score_of(data), 1.5, kernels.Fused(0, backend=backend))
        *_, x = FAMILIES[family](score, z, 12, engine)
        found.append(x)
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()


def test_a_step_of_one_score_is_one_update():
    """Of Langevin's chain each step is one call; Heun's first puts both scores together."""
    calls = []

    class Counting(Reference):
        def __call__(self, step, *given, **parameters):
            move = super().__call__(step, *given, **parameters)

            def counted(*u):
                calls.append(step.__name__)
                return move(*u)
            return counted

    x = noise.normal((2, 2))
    score, engine = guide(score_of(BLURRED), score_of(NARROW), 2., Counting(0))
    list(samplers.annealed_langevin(score, x, [2., 1.], engine, eps=.1, n_steps=2))
    assert calls == ["guided_langevin_step"] * 4
    calls.clear()
    score, engine = guide(score_of(BLURRED), score_of(NARROW), 2., Counting(0))
    list(samplers.dpmpp_2m(score, x, [4., 3., 2., 1.], engine))
    # a score that is used twice is put together once
    assert calls == ["guided_pf_ode_step", "guided", "guided", "dpmpp_2m_step",
                     "guided", "dpmpp_2m_step", "guided_posterior_mean"]


@pytest.mark.parametrize("w", [-1., .5, 3.])
def test_between_equal_normals_guidance_moves_the_mean(w):
    """p = N(0, v) and p(x | y) = N(m, v): at every level p(x | y)^w p^(1 - w) is N(w m, v)
    with its noise. Here alone it is the noisy version of a distribution, and known."""
    times = np.append(rho_levels(400, 80., .002), 0)
    score, engine = guide(score_of(BLURRED), score_of(NARROW), w, Reference())
    x = 80 * noise.normal((4, 2)).astype(float)
    *_, found = samplers.heun(score, x, sde.EDM(80.), times, engine)
    # the flow from T maps N(0, T^2), whose mean is 0, by v / sqrt(v^2 + T^2) about the mean
    v = 4.
    want = w * np.array([1., -1.])
    scale = (v / (v + 80.**2))**.5
    np.testing.assert_allclose(found, want + scale * (x - want), rtol=0, atol=2e-3)


ALONG = np.array([.6, .8])
CLASS = Mixture([.3, .7], [-2.5 * ALONG, 1.5 * ALONG], .3)
EVERYTHING = Mixture([.12, .28, .6], [*CLASS.means, [2., -2.]], .3)


@pytest.mark.parametrize("family", ["reverse_sde", "ddim", "heun"])
def test_samples_at_1_have_the_law_of_their_class(family):
    """The loop's exact law on p(x | y), a mixture of two modes, along their line; and p(x | y)
    itself to the loop's own error: the modes' weights, means and variances."""
    vp = sde.VP()
    times = np.linspace(1, 1e-3, 301)
    alpha_bar = vp.marginal(times[::-1])[0]**2

    def of(data):
        if family == "ddim":
            return lambda x, i: data.noised(alpha_bar[i]**.5, (1 - alpha_bar[i])**.5).score(x)
        return lambda x, t: data.noised(*vp.marginal(t)).score(x)

    loop, arguments = {"reverse_sde": (samplers.reverse_sde, (vp, times)),
                       "heun": (samplers.heun, (vp, times[::3])),
                       "ddim": (samplers.ddim, (alpha_bar,))}[family]
    score, engine = guide(of(EVERYTHING), of(CLASS), 1, Reference(3))
    *_, x = loop(score, samplers.prior((20_000, 2)), *arguments, engine)
    t, w = law(ALONG, loop, of(CLASS), Gaussian([0., 0.], 1.), arguments)
    assert excess(x @ ALONG, t, w) < 0
    left = t < -.5
    assert w[left].sum() == pytest.approx(.3, abs=.01)
    for side, at in ((left, -2.5), (~left, 1.5)):
        mean, variance, _ = moments(t[side], w[side])
        assert mean == pytest.approx(at, abs=.02)
        assert variance == pytest.approx(.3, rel=.06)


def test_a_pairs_scores_are_held_to_their_shapes():
    for engine_of in ENGINES:
        for s, s_y in ((lambda x, t: x[:1], lambda x, t: x), (lambda x, t: x,
                                                              lambda x, t: x[:, :1])):
            for loop, given in ((samplers.pf_ode, (sde.VP(), 3)),
                                (samplers.dpmpp_2m, ([3., 2., 1.],))):
                score, engine = guide(s, s_y, 2., engine_of(0))
                with pytest.raises(ValueError, match="shape"):
                    list(loop(score, noise.normal((3, 2)), *given, engine))


@pytest.mark.parametrize("w, error", [(np.nan, ValueError), (np.inf, ValueError),
                                      ("2", TypeError), (None, TypeError)])
def test_w_is_a_finite_number(w, error):
    with pytest.raises(error, match="w must be"):
        guide(never, never, w, Reference())


def test_a_guided_engine_is_its_engine_in_all_else():
    """It refuses what the engine has drawn, and the families that couple rows with seeds."""
    score, guided_engine = guide(score_of(BLURRED), score_of(NARROW), 2., Reference(0))
    assert isinstance(guided_engine, Guided)
    x = noise.normal((2, 2))
    list(samplers.langevin(lambda x: score(x, 1.), x, 3, guided_engine))
    with pytest.raises(ValueError, match="has drawn PREDICTOR steps 0–2"):
        list(samplers.langevin(lambda x: score(x, 1.), x, 3, guided_engine))
    _, by_row = guide(score_of(BLURRED), score_of(NARROW), 2., Reference([1, 2]))
    with pytest.raises(ValueError, match="its own seed"):
        list(FAMILIES["pf_ode_adaptive"](score, x, 10, by_row))
    assert engine.Engine().whole(x) is x


# ---- what is known of a sample ----

V = np.array([[1., .8], [.8, 1.]])
Y = np.array([[np.nan, 1.5]])
CONDITIONAL = 1.2, .36  # mean and variance of the first, given that the second is 1.5


def at_sigma(sigma):
    return 1., sigma


def correlated(x, sigma):
    """The score of N(0, V + sigma^2 I), and its products."""
    precision = np.linalg.inv(V + sigma**2 * np.eye(2))
    return -x @ precision, lambda v: -v @ precision


def given(form, z, engine):
    """The score of samples like z, of which the second number is Y's, in one of three forms."""
    y = np.broadcast_to(Y, z.shape)
    if form == "replaced":
        return replaced(lambda x, sigma: correlated(x, sigma)[0], y, at_sigma, engine)
    sigma_data = 1. if form == "PiGDM" else None
    return posterior(correlated, y, at_sigma, noise_std=.05, sigma_data=sigma_data)


def law_of(form, family, n):
    """Mean and variance of the unknown number at a family's end, exactly."""
    def sample(z, engine):
        *_, x = FAMILIES[family](given(form, z, engine), z, n, engine)
        return x
    mean, covariance = linear_law(sample, 2)
    return mean, covariance


@pytest.mark.parametrize("form, family, order, mean, variance", [
    ("replaced", "reverse_sde_vp", 1, .750, .494), ("replaced", "ddpm_ancestral", 1, .750, .494),
    ("replaced", "ancestral_ve", 1, .750, .494), ("replaced", "heun", 2, .520, .600),
    ("exact", "reverse_sde_vp", 1, 1.1969, .3618), ("exact", "ddpm_ancestral", 1, 1.1969, .3618),
    ("exact", "ancestral_ve", 1, 1.1969, .3618), ("exact", "edm_churn", 2, 1.1969, .3618),
    ("exact", "ddim", 1, 1.1924, .3613), ("PiGDM", "ddim", 1, 1.1335, .3912),
    ("PiGDM", "reverse_sde_vp", 1, 1.141, .382), ("PiGDM", "ddpm_ancestral", 1, 1.141, .382)])
def test_the_law_of_each_form(form, family, order, mean, variance):
    """The limit of many steps, from two numbers of steps and the order of their errors.

    Only the exact form tends to 1.1970 and .3616, what y with noise .05 tells: the mean is
    .8 * 1.5 / 1.0025. The others keep a bias, however many steps there are. Replacement
    along the flow is the worst: its fresh noise averages out.
    """
    few, many = (law_of(form, family, n) for n in (100, 200))
    twice = 2**order
    of_mean = (twice * many[0][0] - few[0][0]) / (twice - 1)
    of_variance = (twice * many[1][0, 0] - few[1][0, 0]) / (twice - 1)
    assert of_mean == pytest.approx(mean, abs=4e-3)
    assert of_variance == pytest.approx(variance, abs=6e-3)
    if form == "exact":
        exact = .8 * 1.5 / 1.0025, 1 - .64 / 1.0025
        # a flow keeps what its start misses of the mean: N(0, 1) in place of VP's end, .0046
        np.testing.assert_allclose([of_mean, of_variance], exact, rtol=0, atol=5e-3)


def test_replacement_keeps_its_bias_however_many_steps():
    """Twice the steps: the law has settled 30 times nearer than it is to the right one."""
    few, many = (law_of("replaced", "ancestral_ve", n) for n in (200, 400))
    moved = abs(many[0][0] - few[0][0])
    assert moved < abs(many[0][0] - CONDITIONAL[0]) / 30
    # what is known is as it was, but for rounding of the chain's last, all but noiseless step
    assert abs(many[0][1] - 1.5) < 1e-9 and abs(many[1][1]).max() < 1e-9


@pytest.mark.parametrize("form", ["replaced", "exact", "PiGDM"])
def test_samples_have_that_law(form):
    """Mean and variance of 20,000 samples within 4.9 of their own errors of the recursion's,
    and the exact form's of p(x | y)'s, once that has the recursion's error."""
    n = 20_000
    z = samplers.prior((n, 2), seed=5).astype(float)
    reference = Reference(6)
    *_, x = FAMILIES["reverse_sde_vp"](given(form, z, reference), z, 200, reference)
    mean, covariance = law_of(form, "reverse_sde_vp", 200)
    variance = covariance[0, 0]
    error_of_mean = 4.9 * (variance / n)**.5
    error_of_variance = 4.9 * variance * (2 / n)**.5
    assert abs(x[:, 0].mean() - mean[0]) < error_of_mean
    assert abs(x[:, 0].var() - variance) < error_of_variance
    if form == "exact":
        exact = .8 * 1.5 / 1.0025, 1 - .64 / 1.0025
        assert abs(x[:, 0].mean() - exact[0]) < error_of_mean + abs(mean[0] - exact[0])
        assert abs(variance - exact[1]) < .02 * exact[1]


def linearized(data):
    """`linearize` of a mixture: grad s = sum_k gamma_k (s_k s_k^T - 1 / v_k) - s s^T."""
    def linearize(x, sigma):
        noised = data.noised(1, sigma)
        _, s_k, gamma = noised._components(x)
        s = noised.score(x)

        def product(v):
            along = np.einsum("bkd,bd->bk", s_k, v)
            of_components = np.einsum("bk,bk,bkd->bd", gamma, along, s_k)
            narrow = np.einsum("bk,kd->bd", gamma, 1 / noised.variances) * v
            return of_components - narrow - (s * v).sum(-1, keepdims=True) * s
        return s, product
    return linearize


def test_on_a_mixture_the_posterior_is_an_approximation_and_stays_one():
    """Two moons, of small normals: where the first coordinate is .65, the second is -.53 or less,
    but for one in a million and the normals' own std of .03. With its own covariance some 22 in
    100 samples end above, however many steps there are."""
    moons = Mixture(np.ones(200), data.moons(200, 0) * 1.5, .03**2)
    first, second = moons.means.T
    odds = np.exp(-((.65 - first) / .03)**2 / 2)
    above = second[odds > 1e-6 * odds.sum()].max() + 4 * .03
    assert odds[second > above].sum() < 1e-6 * odds.sum()
    y = np.full((1000, 2), [.65, np.nan])
    score = posterior(linearized(moons), y, at_sigma, noise_std=.01)
    for n in (80, 240):
        z = samplers.prior((1000, 2)).astype(float)
        *_, x = FAMILIES["reverse_sde_vp"](score, z, n, Reference(1))
        # of 1,000 samples a share of .22 is right to 6 errors of .013
        assert abs((x[:, 1] > above).mean() - .22) < .08
        assert abs(x[:, 0] - .65).max() < .06  # noise of .01, and that which samplers leave


def test_a_covariance_that_is_none_is_the_weakest():
    """Eigenvalues that are not positive become the one that is given, the others stay."""
    rotation = np.array([[.6, -.8], [.8, .6]])
    for values, want in (([2., -1.], [2., 9.]), ([0., 3.], [9., 3.]), ([1., 4.], [1., 4.])):
        found = definite((rotation * values @ rotation.T)[None], 9.)
        np.testing.assert_allclose(found[0], rotation * want @ rotation.T, rtol=1e-12)
    lopsided = definite(np.array([[[2., 1.], [0., 2.]]]), 9.)
    np.testing.assert_allclose(lopsided[0], [[2., .5], [.5, 2.]])


RNG = np.random.default_rng(1)
ROOT = RNG.normal(size=(3, 3))
PRIOR = ROOT @ ROOT.T + .1 * np.eye(3)
H = RNG.normal(size=(2, 3))


@pytest.mark.parametrize("noise_std", [0., .3])
@pytest.mark.parametrize("a, sigma", [(1., .01), (1., 3.), (.4, .9)])
@pytest.mark.parametrize("measure, y", [
    (None, [[.3, -.2, 1.], [np.nan, .5, np.nan], [np.nan] * 3]),
    (H, [[.3, -.2], [np.nan, .5], [np.nan, np.nan]])])
def test_the_exact_form_is_the_score_given_what_is_known(measure, y, a, sigma, noise_std):
    """Of a Gaussian: x_t is N(a m, a^2 W + sigma^2 I), m and W those of x_0 given y. Each row
    is told another part."""
    y = np.array(y)
    noised = np.linalg.inv(a**2 * PRIOR + sigma**2 * np.eye(3))
    x = RNG.normal(size=y.shape[:1] + (3,))
    score = posterior(lambda x, _: (-x @ noised, lambda v: -v @ noised), y,
                      lambda _: (a, sigma), H=measure, noise_std=noise_std)(x, 0.)
    for row, of_x, s in zip(y, x, score):
        told = row == row
        A = (np.eye(3) if measure is None else measure)[told]
        gain = PRIOR @ A.T @ np.linalg.inv(A @ PRIOR @ A.T + noise_std**2 * np.eye(len(A)))
        m = gain @ row[told]
        W = PRIOR - gain @ A @ PRIOR
        want = -np.linalg.solve(a**2 * W + sigma**2 * np.eye(3), of_x - a * m)
        # C is a difference of numbers 1 + sigma^2 s' that cancel where sigma is large
        scale = abs(want).max() + 1 / sigma**2
        np.testing.assert_allclose(s, want, rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize("measure", [None, H])
def test_pigdm_is_exact_where_data_are_white(measure):
    """Data N(0, .7^2 I): then r^2 is C, for what is known and for any linear map."""
    y = np.array([[.3, np.nan, 1.], [np.nan, .5, -.1]])[:, :len(H) if measure is not None else 3]

    def white(x, sigma):
        v = .7**2 + sigma**2
        return -x / v, lambda u: -u / v

    x = RNG.normal(size=(2, 3))
    both = [posterior(white, y, at_sigma, H=measure, noise_std=.2, sigma_data=sigma_data)
            for sigma_data in (None, .7)]
    for sigma in (.01, .5, 20.):
        exact, by_r = (score(x, sigma) for score in both)
        np.testing.assert_allclose(by_r, exact, rtol=1e-9)


def test_what_is_known_is_replaced_by_new_noise_at_every_call():
    """Tag KNOWN, a step a call; the known part itself follows N(a y, sigma^2)."""
    seen = []

    def score(x, t):
        seen.append(x)
        return 0 * x

    vp = sde.VP()
    y = np.array([[np.nan, 2.], [1., np.nan]])
    x = np.array([[.3, .4], [.5, .6]])
    of_known = replaced(score, y, vp.marginal, Reference(7))
    for step, t in enumerate((.5, .5, .1)):
        a, sigma = vp.marginal(t)
        s = of_known(x, t)
        z = noise.normal((2, 2), 7, step=step, tag=noise.KNOWN)
        np.testing.assert_array_equal(seen[-1][[0, 1], [0, 1]], x[[0, 1], [0, 1]])
        noised = sde.perturb(y, z, a=float(a), sigma=float(sigma))
        np.testing.assert_array_equal(seen[-1][[0, 1], [1, 0]], noised[[0, 1], [1, 0]])
        np.testing.assert_array_equal(s[[0, 1], [0, 1]], 0)
        np.testing.assert_allclose(s[[0, 1], [1, 0]],
                                   ((a * y - x) / sigma**2)[[0, 1], [1, 0]], rtol=1e-15)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"pf_ode_adaptive"}))
def test_a_completed_sample_does_not_depend_on_its_batch_but_for_rounding(family):
    """By either form, in the reference and fused."""
    y = np.array([[np.nan, 1.5], [.5, np.nan], [np.nan, np.nan]])
    z = noise.normal((3, 2))
    for make in (Reference, kernels.Fused):
        for form in (posterior, replaced):
            def sample(rows, make=make, form=form):
                run = make(0, rows.start)
                given = y[rows].astype(np.float32)
                if form is posterior:
                    exact = posterior(correlated, given, at_sigma)
                    score = lambda x, sigma: exact(x, sigma).astype(x.dtype)  # noqa: E731
                else:
                    score = replaced(lambda x, sigma: correlated(x, sigma)[0].astype(x.dtype),
                                     given, at_sigma, run)
                *_, x = FAMILIES[family](score, z[rows], 20, run)
                return x
            # a matrix product of one row may round otherwise than that of three
            np.testing.assert_allclose(sample(slice(1, 2)), sample(slice(0, 3))[1:2],
                                       rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [{"noise_std": -1.}, {"noise_std": np.nan},
                                   {"sigma_data": 0.}, {"sigma_data": np.inf}])
def test_parameters_of_a_posterior_are_in_range(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        posterior(correlated, Y, at_sigma, **wrong)
