"""Norms, the fused denoising loss and the predictor-corrector that uses the norms."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from minidiff import data, kernels, noise, samplers, train
from minidiff import score_matching as sm
from minidiff.affine import coefficients
from minidiff.sde import VE, VP, SubVP
from minidiff.solvers import snr_step_size
from minidiff.targets import Gaussian, Mixture

SHAPES = [(0, 3), (4, 0), (1,), *((3, d) for d in range(1, 10)), (2, 3, 5, 7), (5, 4099), (300, 3)]
COUNTER = {"seed": 2**40 + 3, "sample": 2**32 - 2, "step": 5, "tag": 2}


def ulps(got, want):
    """Distance of positive float32 arrays in units in the last place."""
    return np.abs(np.asarray(got).view(np.int32).astype(int) - np.asarray(want).view(np.int32))


def test_sums_are_the_contracts_within_one_ulp(place):
    """The contract in NumPy's float64; quads as float32."""
    backend, device = place
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.from_numpy(rng.standard_normal(shape, np.float32)).to(dtype)
            got = kernels.norms(x.to(device), backend=backend).cpu()
            flat = x.float().numpy().reshape(shape[0], int(np.prod(shape[1:])))
            want = np.sqrt((flat.astype(float)**2).sum(1)).astype(np.float32)
            # squares and quads round three times more than float64: 2 ulp of the sum, 1 of its root
            assert (ulps(got, want) <= 2).all()
            oracle = kernels.norms(x, backend="numpy")
            assert got.dtype == torch.float32 and (ulps(got, oracle) <= 1).all()
            drawn = kernels.noise_norms(x.to(device), backend=backend, **COUNTER).cpu()
            z = noise.normal(shape, **COUNTER)
            assert (ulps(drawn, kernels.norms(z, backend="numpy")) <= 1).all()


def test_the_loss_is_denoising_and_its_gradient_the_oracles_bits(place):
    backend, device = place
    rng = np.random.default_rng(1)
    for shape in SHAPES[2:]:
        s = rng.standard_normal(shape, np.float32)
        sigma, weight = rng.uniform(.1, 2., (2, shape[0]))
        coef = np.column_stack((coefficients(sm.residual, sigma=sigma), weight / (2 * len(s))))
        value, gradient = kernels.dsm_loss(torch.from_numpy(s).to(device), coef, backend=backend,
                                           **COUNTER)
        _, want = kernels.dsm_loss(s, coef, backend="numpy", **COUNTER)
        assert np.array_equal(gradient.cpu().numpy().view(np.int32), want.view(np.int32))
        z = noise.normal(shape, **COUNTER)
        flat = s.reshape(len(s), -1).astype(float), z.reshape(len(s), -1).astype(float)
        exact = sm.denoising(*flat, sigma[:, None], weight)
        # c, w, product, sum: four roundings of e, doubled by the square, three in the quad
        assert abs(float(value) - exact) <= 12 * 2**-24 * sm.denoising(
            np.abs(flat[0]), np.abs(flat[1]), sigma[:, None], weight)


def test_the_gradient_is_that_of_torch_autograd_bit_for_bit():
    """Of the composed form sum_b w_b |c0 s + cz z|^2, by autograd in float32."""
    rng = np.random.default_rng(2)
    s = torch.from_numpy(rng.standard_normal((37, 1024), np.float32)).requires_grad_()
    coef = rng.uniform(.1, 2., (37, 3)).astype(np.float32)
    _, fused = kernels.dsm_loss(s.detach(), coef, backend="host", **COUNTER)
    z = torch.from_numpy(noise.normal(s.shape, **COUNTER))
    c0, cz, w = torch.from_numpy(coef).unbind(1)
    e = c0[:, None] * s + cz[:, None] * z
    (w * e.square().sum(1)).sum().backward()
    assert torch.equal(fused.view(torch.int32), s.grad.view(torch.int32))


def test_a_training_steps_gradients_are_the_numpy_references():
    """All parameters: the same network, the loss on the host and in NumPy."""
    gradients = []
    for backend in ("host", "numpy"):
        run = train.Trainer(data.load("mixture").train, kernels, 5, batch=64, backend=backend)
        s, loss, gradient = run.objective()
        s.backward(gradient)
        gradients.append([p.grad.clone() for p in run.net.parameters()] + [loss])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def peak_bytes(f):
    """The most bytes the CPU's allocations inside f held at once."""
    with torch.profiler.profile(profile_memory=True) as record:
        f()
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_the_loss_holds_one_tensor_where_the_composed_form_holds_three():
    """Value and gradient: the gradient alone, against z, the residual and what autograd keeps."""
    s = torch.randn(256, 4096)
    coef = torch.rand(256, 3)

    def fused():
        return kernels.dsm_loss(s, coef, backend="host")

    def composed():
        leaf = s.detach().requires_grad_()
        e = coef[:, :1] * leaf + coef[:, 1:2] * torch.randn_like(s)
        (coef[:, 2] * e.square().sum(1)).sum().backward()
        return leaf.grad
    fused(), composed()
    a, b = peak_bytes(fused), peak_bytes(composed)
    assert a < 1.1 * s.nbytes and b >= a + 2 * s.nbytes, (a, b, s.nbytes)


def test_a_training_step_peaks_lower_by_the_noise_and_the_residual():
    """Perturbation, network, loss and backward at 8 MiB a batch: two such tensors less."""
    run = train.Trainer(noise.normal((512, 4096), seed=1), kernels, 5, batch=512)
    x0 = torch.from_numpy(run.x)
    sigma = torch.from_numpy(train.training_levels(512, 0, 0)[0].astype(np.float32))

    def fused():
        s, _, gradient = run.objective()
        s.backward(gradient)

    def composed():
        z = torch.randn_like(x0)
        s = run.net(x0 + sigma[:, None] * z, sigma)
        e = sigma[:, None] * s + z
        (e.square().sum(1) / 512).sum().backward()
    run.objective()[0].sum().backward()  # the parameters' gradients are there from now on
    a, b = peak_bytes(fused), peak_bytes(composed)
    print(f"peak of a training step: {a:,} bytes fused, {b:,} composed; a batch {x0.nbytes:,}")
    assert b - a >= 2 * x0.nbytes, (a, b, x0.nbytes)


def test_the_step_size_is_the_papers():
    """SDE Algorithm 5: alpha = 2 kappa (snr |z| / |s|)^2 and x + alpha s + sqrt(2 alpha) z."""
    z, s = np.array([3.]), np.array([2.])
    alpha = 2 * .9 * (.16 * 1.5)**2
    assert np.allclose(snr_step_size(z, s, .16, .9) / 2, alpha, rtol=1e-15)


@pytest.mark.parametrize("sde", [VE(.01, 10.), VP(), SubVP()], ids=lambda s: type(s).__name__)
def test_predictor_corrector_reaches_the_mixture(sde):
    """2^11 samples in 32 dimensions, 100 times: weight within 6 sigma of the binomial; means and
    deviations within .005 and .011, the steps' own bias at snr .1 (.0028 and .0103). In two
    dimensions |s| of a single sample comes near 0 and the rule's steps explode."""
    target = Mixture([.2, .8], [[-.4] * 32, [.4] * 32], .04)
    def score(x, t):
        return target.at(*sde.marginal(t)).score(x)
    a, sigma = sde.marginal(1.)
    x = samplers.prior((1 << 11, 32), sigma) + a * target.sample(1 << 11)
    times = np.linspace(1, 1e-3, 101)
    *_, x = samplers.predictor_corrector(score, x, sde, times, samplers.Reference(), snr=.1)
    left = x.mean(1) < 0
    assert abs(left.mean() - .2) < 6 * (.16 / 2**11)**.5
    assert abs(x[left].mean() + .4) < .005 and abs(x[~left].mean() - .4) < .005
    assert abs(x[left].std() - .2) < .011 and abs(x[~left].std() - .2) < .011


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_corrector_on_kernels_is_the_langevin_update_at_its_step_size(place, dtype):
    """Given the step size the state is by ==; 16 bits draw z twice, float32 keeps it."""
    backend, device = place
    rng = np.random.default_rng(3)
    x, s = (torch.from_numpy(rng.standard_normal((9, 37), np.float32)).to(
        device, getattr(torch, dtype)) for _ in "xs")
    engine, start, counted = kernels.Fused(seed=4, backend=backend), x.clone(), x.clone()
    got = engine.correct(samplers.langevin.langevin_step, snr_step_size, start, s, 2,
                         noise.CORRECTOR)
    assert got is start
    z = kernels.noise_norms(x, seed=4, step=2, tag=noise.CORRECTOR, backend=backend)
    eps = snr_step_size(z.double(), kernels.norms(s, backend=backend).double()).cpu().numpy()
    want = kernels.apply("langevin", x.cpu(), s.cpu(), eps=eps, seed=4, step=2,
                         tag=noise.CORRECTOR, backend="numpy")
    assert torch.equal(got.cpu(), want)
    engine.correct(samplers.langevin.langevin_step, snr_step_size, counted, s,
               torch.tensor(2, device=device), noise.CORRECTOR)
    assert torch.equal(counted.cpu(), want)  # a counter is the noise's step here, not a row


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_noise_norms_store_the_noise_where_asked(place, dtype):
    backend, device = place
    for shape in SHAPES:
        out = torch.full(shape, torch.nan, dtype=getattr(torch, dtype), device=device)
        got = kernels.noise_norms(torch.empty_like(out), out=out, backend=backend, **COUNTER)
        assert torch.equal(got, kernels.noise_norms(out, backend=backend, **COUNTER))
        z = torch.from_numpy(noise.normal(shape, **COUNTER)).to(out.dtype)
        assert torch.equal(out.cpu(), z)


def test_noise_of_ones_own_moves_as_the_contracts_drawn_inside(place):
    """Reference and Fused take normal(shape, k, tag): given the contract's, the same bits."""
    backend, device = place
    x, s = torch.randn(2, 5, 7).unbind(0)
    def normal(shape, k, tag):
        return torch.from_numpy(noise.normal(shape, 3, 5, k, tag)).to(device)
    engines = (kernels.Fused(3, 5, backend), kernels.Fused(backend=backend, normal=normal))
    for name, p in (("langevin", {"eps": .1}), ("ddpm_clipped", {
            "alpha_bar": .3, "alpha_bar_prev": .6, "variance": .2, "clip": (-.5, .8)}),
            ("pf_ode", {"sde": VP(), "t": .5, "dt": .01})):
        row = kernels.OPS[name]
        drawn, given = (engine(row.step, 2, row.denoise, **p)(4, x.to(device), s.to(device))
                        for engine in engines)
        assert torch.equal(drawn, given), name
    drawn, given = (engine.correct(samplers.langevin.langevin_step, snr_step_size,
                                   x.to(device).clone(), s.to(device), 4, noise.CORRECTOR)
                    for engine in engines)
    assert torch.equal(drawn, given)
    still = samplers.Reference(normal=lambda shape, k, tag: np.zeros(shape))
    moved = still(samplers.langevin.langevin_step, 2, eps=.1)(0, x.numpy(), s.numpy())
    assert np.array_equal(moved, x.numpy() + .05 * s.numpy())


def test_one_op_corrects_in_two_threads():
    """The noise that is kept is a thread's own, and of x's kind."""
    engine, s = kernels.Fused(seed=4, backend="host"), torch.randn(512, 1024)

    def run(n):
        x = [torch.ones(512, n) for _ in range(4)]
        for k, u in enumerate(x):
            engine.correct(samplers.langevin.langevin_step, snr_step_size, u, s[:, :n], k, 4)
        return x
    want = {n: run(n) for n in (1024, 1000)}
    with ThreadPoolExecutor(2) as pool:
        for n, got in zip([1024, 1000] * 4, pool.map(run, [1024, 1000] * 4)):
            assert all(map(torch.equal, got, want[n]))
    empty = engine.correct(samplers.langevin.langevin_step, snr_step_size,
                           np.ones((0, 3), np.float32), np.ones((0, 3), np.float32), 0, 4)
    still = samplers.Reference().correct(samplers.langevin.langevin_step, snr_step_size,
                                       np.ones((0, 3)), np.ones((0, 3)), 0, 4)
    assert empty.shape == still.shape == (0, 3)


def test_a_corrected_loop_follows_the_reference():
    """Float32 against float64 over 20 steps towards N(0, I): each a contraction, so errors of
    2^-24 a step and operand stay below 1e-4."""
    target = Gaussian([0., 0., 0.], 1.)
    def score(x, t):
        return target.at(*VP().marginal(t)).score(x)
    z, times = samplers.prior((16, 3)), np.linspace(1, .01, 21)
    *_, exact = samplers.predictor_corrector(score, z.astype(float), VP(), times,
                                           samplers.Reference(seed=1))
    *_, fused = samplers.predictor_corrector(lambda x, t: score(x, t).astype(np.float32), z, VP(),
                                           times, kernels.Fused(seed=1, backend="host"))
    assert fused.dtype == np.float32 and np.abs(fused - exact).max() < 1e-4


def test_the_clip_stage_is_two_functions_and_a_clip_between():
    """ddpm_clipped against the reference in float64: derived as for every row, seven roundings a
    stage on terms that the clip bounds."""
    rng = np.random.default_rng(5)
    x, s = rng.standard_normal((2, 64, 5), np.float32)
    p = {"alpha_bar": .3, "alpha_bar_prev": .6, "variance": .2}
    got = kernels.apply("ddpm_clipped", x, s, clip=(-1., 1.), backend="host", **p, **COUNTER)
    op = kernels.OPS["ddpm_clipped"]
    exact = samplers.Reference(COUNTER["seed"], COUNTER["sample"])(
        op.step, COUNTER["tag"], denoise=op.denoise, clip=(-1., 1.), **p)(
        COUNTER["step"], x.astype(float), s.astype(float))
    scale = np.abs(x) + np.abs(s) + np.abs(noise.normal(x.shape, **COUNTER)) + 1
    assert (np.abs(got - exact) <= 14 * 2**-24 * 2 * scale).all()


def test_a_device_counter_walks_the_table(place):
    """Fused with a tensor for k: the same bits as with numbers, and the counter is not written."""
    backend, device = place
    eps = np.linspace(.1, .01, 4)
    x, s = torch.randn(5, 7).to(device), torch.randn(5, 7).to(device)
    move = kernels.Fused(seed=1, backend=backend)(samplers.langevin.langevin_step, 2, eps=eps)
    for k in range(4):
        counter = torch.tensor(k, device=device)
        assert torch.equal(move(counter, x, s), move(k, x, s)) and int(counter) == k
