"""The identities that make score matching work, by quadrature: no Monte Carlo where none is
needed. A trapezoid sum of a smooth function that decays converges faster than any power of
its spacing; the spacings below leave only rounding: at most 5329 terms, of moduli adding to
about 2, each sum within 5329 * 1.1e-16 of it. Hence 1e-12 wherever a quadrature is compared."""

import numpy as np
import pytest
import torch

from minidiff import ddpm, noise, samplers, solvers
from minidiff.predictions import (
    as_score,
    flow_velocity,
    inverse,
    noise_prediction,
    posterior_mean,
    preconditioned,
    rescaled,
    v_prediction,
)
from minidiff.score_matching import denoising, explicit, implicit, sliced, sliced_vr
from minidiff.sde import EDM, VE, VP, FlowMatching, SubVP, importance_times
from minidiff.targets import Gaussian, Mixture

PLANE = Mixture([.3, .7], [[-1., .5], [1.5, -.5]], [.5, .8])
LINE = Mixture([.3, .7], [[-1.], [1.5]], [.5, .8])
SIGNS = [np.array([[i, j]]) for i in (-1., 1.) for j in (-1., 1.)]  # every Rademacher probe
A = np.array([[-1., .6], [-.2, -.5]])  # not symmetric: the gradient of no density
GRID = np.linspace(-9, 9, 73)


def affine(x):
    """s = A x + 1 and its Jacobian, (B, 2, 2)."""
    return x @ A.T + 1, np.broadcast_to(A, (len(x), 2, 2))


def bent(x):
    """s = tanh(A x) - x / 2 and its Jacobian."""
    h = np.tanh(x @ A.T)
    return h - x / 2, (1 - h**2)[..., None] * A - np.eye(2) / 2


MODELS = pytest.mark.parametrize("model", [affine, bent])


def expectation(objective, w, *arrays):
    """E[objective] under weights w: each row's own value, weighted."""
    return sum(w[i] * objective(*(u[i:i + 1] for u in arrays)) for i in range(len(w)))


def over_plane():
    """Nodes (B, 2) and weights (B,) of an expectation over PLANE."""
    x = np.stack(np.meshgrid(GRID, GRID), -1).reshape(-1, 2)
    return x, np.exp(PLANE.log_density(x)) * (GRID[1] - GRID[0])**2


def over_noised_line(a, sigma):
    """x~ = a x0 + sigma z, z and `weight` of an expectation over x0 ~ LINE, z ~ N(0, 1).

    denoising is a mean of w e^2 over B rows, so the quadrature's weights enter it as B w.
    """
    x0, z = (u.reshape(-1, 1) for u in np.meshgrid(GRID, GRID))
    w = np.exp(LINE.log_density(x0) - z[:, 0]**2 / 2) / (2 * np.pi)**.5 * (GRID[1] - GRID[0])**2
    return a * x0 + sigma * z, z, len(w) * w


def probed(objective, s, v, jacobian):
    """A sliced objective with one probe v for all points."""
    v = np.broadcast_to(v, s.shape)
    return objective(s, v, np.einsum("bij,bj->bi", jacobian, v))


@MODELS
def test_explicit_minus_implicit_is_half_the_fisher_information_whatever_the_model(model):
    x, w = over_plane()
    score, (s, jacobian) = PLANE.score(x), model(x)
    gap = expectation(explicit, w, s, score) \
        - expectation(implicit, w, s, np.trace(jacobian, axis1=1, axis2=2))
    assert gap == pytest.approx(.5 * w @ (score**2).sum(-1), abs=1e-12)


def test_the_score_itself_has_no_explicit_loss_and_the_least_implicit_one():
    x, w = over_plane()
    s = PLANE.score(x)
    assert explicit(s, s) == 0
    assert expectation(implicit, w, s, PLANE.jacobian_trace(x)) \
        == pytest.approx(-.5 * w @ (s**2).sum(-1), abs=1e-12)


def test_each_objective_is_the_mean_over_its_rows():
    x = PLANE.sample(8)
    s, jacobian = bent(x)
    for objective, *arrays in ((explicit, s, x), (implicit, s, s[:, 0]), (sliced, s, x, s),
                               (sliced_vr, s, x, s), (lambda s, z: denoising(s, z, 2.), s, x)):
        assert objective(*arrays) \
            == pytest.approx(expectation(objective, np.full(8, 1 / 8), *arrays), rel=1e-14)


SIX, THREE, COLUMN = np.ones((3, 2)), np.ones(3), np.ones((3, 1))
PROBES = {"v": SIX, "jacobian_v": SIX}


@pytest.mark.parametrize("objective, kw, bad", [
    (explicit, {"score": SIX}, {"score": [SIX[0], COLUMN, SIX[None]]}),
    (implicit, {"trace": THREE}, {"trace": [COLUMN, THREE[:1], THREE[0]]}),
    (sliced, PROBES, {"v": [COLUMN, SIX[0]], "jacobian_v": [COLUMN, SIX[0]]}),
    (sliced_vr, PROBES, {"v": [COLUMN, SIX[:1]], "jacobian_v": [COLUMN, SIX[:1]]}),
    (denoising, {"z": SIX, "sigma": 1.}, {"z": [COLUMN, SIX[0], THREE[0]],
                                          "sigma": [THREE, SIX[0], SIX[:, :, None]]})])
def test_shapes_whose_product_would_be_another_mean_are_refused(objective, kw, bad):
    for kind in (np.asarray, torch.as_tensor):
        def call(kind=kind, s=SIX, **more):
            return objective(*(v if isinstance(v, float) else kind(v)
                               for v in (s, *(kw | more).values())))
        assert np.isfinite(float(call()))
        for name, values in (bad | {"weight": [COLUMN, THREE[:2]]}).items():
            for value in values:
                with pytest.raises(ValueError, match=f"{name} (has shape|must be|a scalar)"):
                    call(**{name: value})


@pytest.mark.parametrize("objective, arguments", [
    (explicit, (SIX,)), (implicit, (THREE, THREE)), (sliced, (SIX, SIX, THREE)),
    (sliced_vr, (SIX, SIX, THREE)), (denoising, (SIX, COLUMN, THREE))], ids=lambda f: "")
def test_an_objective_compiles_whole(objective, arguments):
    s, *rest = map(torch.as_tensor, (SIX, *arguments))
    whole = torch.compile(objective, backend="eager", fullgraph=True)
    assert whole(s, *rest).item() == objective(s, *rest).item()


@MODELS
@pytest.mark.parametrize("objective", [sliced, sliced_vr])
def test_the_mean_over_all_rademacher_probes_is_the_implicit_objective(objective, model):
    s, jacobian = model(PLANE.sample(64))
    mean = np.mean([probed(objective, s, v, jacobian) for v in SIGNS])
    assert mean == pytest.approx(implicit(s, np.trace(jacobian, axis1=1, axis2=2)), rel=1e-14)


@MODELS
@pytest.mark.parametrize("objective", [sliced, sliced_vr])
def test_the_mean_over_normal_probes_is_the_implicit_objective(objective, model):
    s, jacobian = model(PLANE.sample(64))
    nodes, w = np.polynomial.hermite_e.hermegauss(3)  # exact to degree 5; v enters as v^2
    mean = sum(w_i * w_j * probed(objective, s, v, jacobian)
               for v_i, w_i in zip(nodes, w) for v_j, w_j in zip(nodes, w)
               for v in [np.array([[v_i, v_j]])]) / (2 * np.pi)
    assert mean == pytest.approx(implicit(s, np.trace(jacobian, axis1=1, axis2=2)), rel=1e-13)


@pytest.mark.parametrize("probe, variance", [
    # Var[v.Av]: sum over i < j of (a_ij + a_ji)^2 for signs; 2 |(A + A')/2|^2 for normals
    (noise.rademacher, .4**2), (noise.normal, 2 * ((A + A.T) / 2)**2 @ np.ones(2) @ np.ones(2))])
def test_the_mean_of_hutchinson_probes_is_the_trace(probe, variance):
    n = 2**16
    v = probe((n, 2), seed=1, tag=noise.PROBE).astype(np.float64)
    # with a model that is 0 here the reduced form is v . (grad s) v alone; alpha = 1e-6: 4.89
    mean = sliced_vr(np.zeros((n, 2)), v, v @ A.T)
    assert abs(mean - np.trace(A)) < 4.89 * (variance / n)**.5


@MODELS
def test_probes_of_unit_norm_scale_the_plain_form_by_one_over_d(model):
    s, jacobian = model(PLANE.sample(64))
    unit = [v / 2**.5 for v in SIGNS]
    mean = np.mean([probed(sliced, s, v, jacobian) for v in unit])
    assert mean == pytest.approx(implicit(s, np.trace(jacobian, axis1=1, axis2=2)) / 2, rel=1e-14)


def test_probes_of_unit_norm_move_the_minimiser_of_the_reduced_form():
    # data N(0, I), s = -c x: the trace is -2c, E|s|^2 = 2 c^2. The minimum over c of
    # -2c + c^2 is 1; with the trace halved, of -c + c^2, it is 1/2.
    x, w = over_plane()
    w = np.exp(Gaussian([0., 0.], 1.).log_density(x)) * (GRID[1] - GRID[0])**2
    x, w = x[w > 1e-18], w[w > 1e-18]  # the rest adds less than 1e-13

    def minimiser(v):
        u = np.broadcast_to(v, x.shape)
        low, middle, high = (expectation(sliced_vr, w, -c * x, u, -c * u) for c in (0., 1., 2.))
        return 1 + (low - high) / (2 * (low - 2 * middle + high))  # the parabola's vertex

    assert minimiser(SIGNS[0]) == pytest.approx(1, abs=1e-12)
    assert minimiser(SIGNS[0] / 2**.5) == pytest.approx(.5, abs=1e-12)


NOISE = pytest.mark.parametrize("a, sigma", [(1., .5), (.6, .8)])


@NOISE
def test_denoising_minus_explicit_on_the_noised_data_is_the_same_for_every_model(a, sigma):
    x, z, weight = over_noised_line(a, sigma)
    q, nodes = LINE.noised(a, sigma), np.linspace(-15, 15, 301)[:, None]
    w, score = np.exp(q.log_density(nodes)) * .1, q.score(nodes)
    # E|z / sigma|^2 = 1 / sigma^2, less the Fisher information of q, halved
    constant = .5 * (1 / sigma**2 - w @ (score**2).sum(-1))
    for model in (np.tanh, lambda x: 1 - .3 * x, lambda x: np.sin(x) - x):
        gap = denoising(model(x), z, sigma, weight) \
            - expectation(explicit, w, model(nodes), score)
        assert gap == pytest.approx(constant, abs=1e-12)


@NOISE
def test_the_minimiser_of_denoising_is_the_score_of_the_noised_data(a, sigma):
    # in any direction h the loss rises by eps^2 E[h^2] / 2 exactly: no first-order term
    x, z, weight = over_noised_line(a, sigma)
    s = LINE.noised(a, sigma).score(x)
    for h in (np.tanh(x), x, np.cos(3 * x), np.ones_like(x)):
        for eps in (.1, -.1):
            rise = denoising(s + eps * h, z, sigma, weight) - denoising(s, z, sigma, weight)
            assert rise == pytest.approx(.5 * eps**2 * (weight * h[:, 0]**2).mean(), abs=1e-12)


def test_weight_sigma_squared_makes_denoising_a_noise_prediction():
    x, z = PLANE.sample(16), noise.normal((16, 2)).astype(np.float64)
    assert denoising(x, z, .3, weight=.09) \
        == pytest.approx(.5 * ((.3 * x + z)**2).sum(-1).mean(), rel=1e-14)
    sigma = np.linspace(.1, 2, 16)
    assert denoising(x, z, sigma[:, None], weight=sigma**2) \
        == pytest.approx(.5 * ((sigma[:, None] * x + z)**2).sum(-1).mean(), rel=1e-14)


@NOISE
def test_posterior_mean_is_the_gaussian_one(a, sigma):
    p = Gaussian([1., -2.], [.25, 3.])
    x = np.array([[0., 0.], [3., -4.], [-20., 7.]])
    mean, variance = p.means[0], p.variances[0]
    gain = a * variance / (a**2 * variance + sigma**2)
    np.testing.assert_allclose(posterior_mean(x, p.noised(a, sigma).score(x), a, sigma),
                               mean + gain * (x - a * mean), rtol=1e-13)


@NOISE
def test_posterior_mean_is_the_mixture_one_by_quadrature(a, sigma):
    x0, x = np.linspace(-9, 9, 289), np.array([[-3.], [0.], [.4], [5.]])
    p = np.exp(LINE.log_density(x0[:, None]) - (x - a * x0)**2 / (2 * sigma**2))
    np.testing.assert_allclose(posterior_mean(x, LINE.noised(a, sigma).score(x), a, sigma)[:, 0],
                               (p * x0).sum(-1) / p.sum(-1), rtol=1e-12)


# ---- what a network may predict ----

PREDICTIONS = pytest.mark.parametrize("prediction", [
    posterior_mean, noise_prediction, v_prediction, flow_velocity, preconditioned],
    ids=lambda f: f.__name__)
MARGINALS = pytest.mark.parametrize("a, sigma", [(1., .5), (.6, .8), (.999, .002), (1., 80.),
                                                 (.0065, 1.)])


@PREDICTIONS
@MARGINALS
def test_a_prediction_is_undone_exactly(prediction, a, sigma):
    rng = np.random.default_rng(1)
    x, s = rng.standard_normal((2, 50, 3))
    u = prediction(x, s, a, sigma)
    # u - p x leaves q s: rounding of u, |p x| eps, over q
    size = np.abs(prediction(1., 0., a, sigma) / prediction(0., 1., a, sigma) * x).max() + 3
    np.testing.assert_allclose(inverse(prediction)(x, u, a=a, sigma=sigma), s, rtol=0,
                               atol=4 * 2**-53 * size)
    again = prediction(x, inverse(prediction)(x, u, a=a, sigma=sigma), a, sigma)
    np.testing.assert_allclose(again, u, rtol=1e-12, atol=1e-14 * size)


@MARGINALS
def test_predictions_are_what_they_are_called_of_x0_and_z(a, sigma):
    """Given x0 and z the score of q(x | x0) is -z / sigma, and each prediction is exact."""
    x0, z = np.random.default_rng(2).standard_normal((2, 40))
    x, s = a * x0 + sigma * z, -z / sigma
    scale = (np.abs(x) + sigma * np.abs(z)) / a
    np.testing.assert_allclose(noise_prediction(x, s, a, sigma), z, rtol=1e-15)
    assert (np.abs(posterior_mean(x, s, a, sigma) - x0) <= 1e-15 * scale).all()
    assert (np.abs(flow_velocity(x, s, a, sigma) - (z - x0)) <= 1e-15 * (scale + 1)).all()
    assert (np.abs(v_prediction(x, s, a, sigma) - (a * z - sigma * x0))
            <= 1e-15 * (1 + sigma) * scale).all()
    # EDM's table 1, in its variable x / a at sigma / a: D = c_skip x + c_out F
    level, sd = sigma / a, .5
    c_skip, c_out = sd**2 / (level**2 + sd**2), level * sd / (level**2 + sd**2)**.5
    D = c_skip * x / a + c_out * preconditioned(x, s, a, sigma)
    assert (np.abs(D - x0) <= 3e-15 * scale).all()


@pytest.mark.parametrize("loop", ["pf_ode", "heun", "ddim", "dpmpp_2m", "reverse_sde", "edm",
                                  "ancestral", "clipped", "annealed_langevin", "corrected", "flow",
                                  "flow_sde"])
def test_every_parametrisation_gives_one_trajectory(loop):
    """Any sampler on any network: the states of each differ from the score's own by rounding,
    below 1e-10 of float64 states of moduli up to 80."""
    alpha_bar = ddpm.alpha_bars(ddpm.linear_betas())[::20]
    index = lambda i: (alpha_bar[i]**.5, (1 - alpha_bar[i])**.5)
    times, sigmas = np.linspace(1, 1e-3, 41), solvers.rho_levels(30, 80., .01)
    betas = ddpm.subset_betas(alpha_bar)
    run, marginal, scale = {
        "edm": (lambda s, x, engine: samplers.edm(s, x, sigmas, engine, s_churn=10.),
                EDM().marginal, 80.),
        "ancestral": (lambda s, x, engine: samplers.ancestral(s, x, betas, engine), index, 1.),
        "clipped": (lambda s, x, engine: samplers.ancestral(s, x, betas, engine, clip=(-2., 2.)),
                    index, 1.),
        "annealed_langevin": (lambda s, x, engine: samplers.annealed_langevin(
            s, x, sigmas[::3], engine, 1e-6, 3), EDM().marginal, 80.),
        "corrected": (lambda s, x, engine: samplers.predictor_corrector(
            s, x, VP(), times, engine, corrector="batch_langevin"), VP().marginal, 1.),
        "pf_ode": (lambda s, x, engine: samplers.pf_ode(s, x, VP(), times, engine),
                   VP().marginal, 1.),
        "heun": (lambda s, x, engine: samplers.heun(s, x, SubVP(), times, engine),
                 SubVP().marginal, 1.),
        "ddim": (lambda s, x, engine: samplers.ddim(s, x, alpha_bar, engine, eta=.5), index, 1.),
        "reverse_sde": (lambda s, x, engine: samplers.reverse_sde(s, x, VE(), times, engine),
                        VE().marginal, 50.),
        "flow": (lambda s, x, engine: samplers.pf_ode(s, x, FlowMatching(), 40, engine),
                 FlowMatching().marginal, 1.),
        "flow_sde": (lambda s, x, engine: samplers.reverse_sde(
            s, x, FlowMatching(), .999 * times, engine), FlowMatching().marginal, 1.),
        "dpmpp_2m": (lambda s, x, engine: samplers.dpmpp_2m(s, x, sigmas, engine),
                     EDM().marginal, 80.),
    }[loop]
    score = lambda x, level: PLANE.noised(*marginal(level)).score(x)
    x = scale * noise.normal((16, 2), seed=3).astype(np.float64)
    own = list(run(score, x, samplers.Reference(seed=4)))
    for prediction in (posterior_mean, noise_prediction, v_prediction, flow_velocity,
                       preconditioned):
        network = lambda x, level, f=prediction: f(x, score(x, level), *marginal(level))
        states = run(as_score(network, prediction, marginal), x, samplers.Reference(seed=4))
        for got, want in zip(states, own, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


def test_vp_and_ve_are_one_trajectory_in_two_forms():
    """DDIM from a x0 + sigma z, divided by a, is Euler in EDM's time from x0 + (sigma / a) z."""
    alpha_bar = ddpm.alpha_bars(ddpm.linear_betas())[::20]
    a, sigma = alpha_bar**.5, (1 - alpha_bar)**.5
    ve = lambda x, level: PLANE.noised(1., level).score(x)
    x = noise.normal((16, 2), seed=3).astype(np.float64)
    vp = samplers.ddim(rescaled(ve, lambda i: (a[i], sigma[i])), x, alpha_bar, samplers.Reference())
    edm = samplers.pf_ode(ve, x / a[-1], EDM(200.), [*(sigma / a)[::-1], 0.], samplers.Reference())
    for k, (one, other) in enumerate(zip(vp, edm, strict=True)):
        scale = a[::-1][k + 1] if k < 49 else 1.
        np.testing.assert_allclose(one / scale, other, rtol=0, atol=1e-10)


# ---- times by importance ----

@pytest.mark.parametrize("sde", [VE(), VP(), SubVP(), EDM(), FlowMatching()],
                         ids=lambda s: type(s).__name__)
def test_importance_times_have_density_g2_over_sigma2(sde):
    """t(u) falls in [t_min, T], and dt/du = Z sigma^2 / g^2: the density is g^2 / (Z sigma^2).
    Central differences of h = 1e-5: h^2 / 6 times a third derivative below (ln 5e4)^3 of t."""
    u, h = np.linspace(.01, .99, 99), 1e-5
    t, Z = importance_times(sde, u)
    rate = (importance_times(sde, u + h)[0] - importance_times(sde, u - h)[0]) / (2 * h)
    np.testing.assert_allclose(rate, Z * sde.marginal(t)[1]**2 / sde.diffusion(t)**2, rtol=1e-6)
    ends, _ = importance_times(sde, np.array([0., 1.]))
    np.testing.assert_allclose(ends, [1e-5, sde.T], rtol=1e-9)


def test_the_likelihood_weighted_objective_is_the_same_by_importance():
    """The integral over t of g^2 / 2 E|s - grad log q|^2, uniformly and by importance, each by a
    trapezoid sum: h^2 / 12 of a smooth integrand, below 1e-4 of it here."""
    sde, z = VP(), noise.normal((64, 2), seed=1).astype(np.float64)
    x0 = PLANE.sample(64, seed=2)

    def loss(t, weight):
        a, sigma = sde.marginal(t)
        return denoising(-(a * x0 + sigma * z), z, sigma, weight)  # the score of N(0, I)
    t = np.geomspace(1e-3, 1, 4001)
    uniform = np.trapezoid([loss(v, sde.diffusion(v)**2) for v in t], t)
    t, Z = importance_times(sde, u := np.linspace(0, 1, 2001), t_min=1e-3)
    by_importance = np.trapezoid([loss(v, Z * sde.marginal(v)[1]**2) for v in t], u)
    assert by_importance == pytest.approx(uniform, rel=1e-4)
