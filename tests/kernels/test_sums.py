"""Norms, the fused denoising loss and the predictor-corrector that uses the norms."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from exact import FLOATS, difference
from minidiff import data, kernels, noise, samplers, score_matching, train
from minidiff.affine import coefficients
from minidiff.kernels import backends
from minidiff.kernels.check.compare import guarded
from minidiff.kernels.launch import Launch, Result
from minidiff.kernels.sums import both_norms
from minidiff.langevin import langevin_step
from minidiff.sde import VP
from minidiff.solvers import snr_step_size
from minidiff.targets import Gaussian

SHAPES = [(0, 3), (4, 0), (1,), (5, 1), (5, 3), (5, 8), (300, 2), (13, 101), (3, 4099), (2, 3, 4)]
COUNTER = {"seed": 2**40 + 3, "sample": 2**32 - 2, "step": 5, "tag": 2}


def close(got, want, last_places=1):
    """Positive float32 arrays within so many units in the last place."""
    got, want = (torch.as_tensor(v).float().cpu().reshape(-1) for v in (got, want))
    assert got.shape == want.shape
    return bool(((got.view(torch.int32) - want.view(torch.int32)).abs() <= last_places).all())


@pytest.mark.parametrize("dtype", FLOATS)
def test_norms(place, dtype):
    """Within 1 ulp of NumPy's; and that of float64's: a square, and two sums of positive
    numbers, are rounded to float32 (3 e of the sum, 1.5 e of its root), then the root (e)."""
    backend, device = place
    uneven = torch.full((3, 4099), 2.**-13)  # summed in float32 the small squares are lost
    uneven[:, ::61] = 1.
    for x in [torch.from_numpy(noise.normal(shape, seed=11)) for shape in SHAPES] + [uneven]:
        x = x.to(getattr(torch, dtype))
        got = kernels.norms(x.to(device), backend=backend)
        exact = x.double().reshape(len(x), -1).norm(dim=1) if x.numel() else torch.zeros(len(x))
        assert got.dtype == torch.float32 and close(got, kernels.norms(x, backend="numpy")), x.shape
        assert ((got.cpu() - exact).abs() <= 2.51 * 2.**-24 * exact).all(), x.shape


@pytest.mark.parametrize("dtype", FLOATS)
def test_noise_norms(place, dtype):
    """Those of the noise an update would draw, in float32 whatever like's dtype."""
    backend, device = place
    for shape in SHAPES:
        like, whole = guarded(torch.ones(shape), getattr(torch, dtype), device)
        got = kernels.noise_norms(like, backend=backend, **COUNTER)
        want = kernels.norms(noise.normal(shape, **COUNTER), backend="numpy")
        assert close(got, want), shape
        assert whole() and bool((like == 1).all()), shape


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("seeds", ["one", "a row"])
def test_both_norms_are_the_two(place, dtype, seeds):
    """Of an array and of the noise beside it, in one pass, which writes to neither."""
    backend, device = place
    for shape in SHAPES:
        x, whole = guarded(torch.from_numpy(noise.normal(shape, seed=11)), getattr(torch, dtype),
                           device)
        before = x.clone()
        counter = COUNTER
        if seeds == "a row":
            rows = np.arange(shape[0])
            counter = COUNTER | {"seed": rows * 2**40 + 5, "sample": 3 * rows}
        of_z, of_x = both_norms(x, backend=backend, **counter)
        assert of_x.dtype == of_z.dtype == torch.float32
        assert close(of_x, kernels.norms(x.cpu(), backend="numpy")), shape
        assert close(of_z, kernels.noise_norms(x.cpu(), backend="numpy", **counter)), shape
        assert whole() and torch.equal(x, before), shape


def test_two_terms_have_a_coefficient_each(place):
    """Of a Launch; `both_norms` has ones."""
    name, device = place
    coef = torch.tensor([[2., 3.]], device=device)
    for shape in ((5, 3), (300, 2), (3, 4099)):
        x = torch.ones(shape, device=device)
        launch = Launch(x, [x], coef, "all", True, False, Result.TERMS, seed=7, sample=1, tag=2)
        run = backends.prepared(backends.backend(name), name, launch)
        of_x, of_z = run(5).unbind(1)
        z = torch.from_numpy(noise.normal(shape, seed=7, sample=1, step=5, tag=2)).double()
        assert of_x.tolist() == [4 * shape[1]] * shape[0]
        assert torch.allclose(of_z.cpu(), 9 * (z * z).sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dsm_loss(place, dtype):
    """The gradient is NumPy's bits, and those of torch's autograd of the composed form; the
    value is within 1 ulp of NumPy's, and of sum w e^2 in float64 by a norm's bound, squared
    (3 e), and the last rounding."""
    backend, device = place
    kind = getattr(torch, dtype)
    rng = np.random.default_rng(12)
    for n, shape in enumerate(SHAPES):
        sigma = rng.uniform(.1, 5, shape[0])
        c0, cz = coefficients(score_matching.residual, sigma=sigma).T
        coef = np.stack((c0 * rng.uniform(.5, 2), cz, sigma**2 / (2 * max(1, shape[0]))), -1)
        coef = coef if n % 2 or not shape[0] else coef[0]
        s = torch.from_numpy(rng.standard_normal(shape, np.float32)).to(kind)
        value, gradient = kernels.dsm_loss(s.to(device), coef, backend=backend, **COUNTER)
        want, _ = kernels.dsm_loss(s.float(), coef, backend="numpy", **COUNTER)
        leaf = s.float().requires_grad_()
        c = torch.from_numpy(np.broadcast_to(coef, (shape[0], 3)).astype(np.float32)).reshape(
            shape[0], 3, *[1] * (len(shape) - 1)).unbind(1)
        e = c[0] * leaf + c[1] * torch.from_numpy(noise.normal(shape, **COUNTER))
        (c[2] * e * e).sum().backward()
        exact = (c[2].double() * e.detach().double()**2).sum()
        assert difference(gradient, leaf.grad.to(kind)) is None, shape
        assert value.shape == () and close(value, want), shape
        assert abs(value.cpu() - exact) <= 4.01 * 2.**-24 * exact, shape


def test_dsm_loss_is_denoising_score_matching():
    """With the coefficients of its docstring. A residual of two terms is off by at most
    d = gamma_3 (|c0 s| + |cz z|), its square by 2 |e| d + d^2."""
    sigma, weight = np.linspace(.5, 2, 8), np.linspace(1, 3, 8)
    c0, cz = coefficients(score_matching.residual, sigma=sigma).T
    s, z = noise.normal((8, 20), seed=13), noise.normal((8, 20), seed=14)
    value, _ = kernels.dsm_loss(s, np.stack((c0, cz, weight / 16), -1), seed=14, tag=noise.PRIOR)
    s, z, sigma = s.astype(np.float64), z.astype(np.float64), sigma[:, None]
    d = 3.01 * 2.**-24 * (np.abs(s) + np.abs(z / sigma))
    e = np.abs(score_matching.residual(s, z, sigma))
    exact = score_matching.denoising(s, z, sigma, weight)
    slack = (weight[:, None] / 16 * (2 * e * d + d**2)).sum() + 5 * 2.**-24 * exact
    assert abs(value - exact) <= slack


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_corrector_on_kernels_is_the_langevin_update_at_its_step_size(place, dtype):
    """Given the step size the state is by ==; 16 bits draw z twice, float32 keeps it."""
    backend, device = place
    rng = np.random.default_rng(3)
    x, s = (torch.from_numpy(rng.standard_normal((9, 37), np.float32)).to(
        device, getattr(torch, dtype)) for _ in "xs")
    engine, start, counted = kernels.Fused(seed=4, backend=backend), x.clone(), x.clone()
    correct = engine.corrector(langevin_step, snr_step_size, noise.CORRECTOR)
    got = correct(2, start, s)
    assert got is start
    z = kernels.noise_norms(x, seed=4, step=2, tag=noise.CORRECTOR, backend=backend)
    eps = snr_step_size(z.double(), kernels.norms(s, backend=backend).double()).cpu().numpy()
    want = kernels.apply("langevin", x.cpu(), s.cpu(), eps=eps, seed=4, step=2,
                         tag=noise.CORRECTOR, backend="numpy")
    assert torch.equal(got.cpu(), want)
    correct(torch.tensor(2, device=device), counted, s)
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
        drawn, given = (engine(row.step, 2, denoise=row.denoise, **p)(4, x.to(device), s.to(device))
                        for engine in engines)
        assert torch.equal(drawn, given), name
    drawn, given = (engine.corrector(langevin_step, snr_step_size, noise.CORRECTOR)(
        4, x.to(device).clone(), s.to(device)) for engine in engines)
    assert torch.equal(drawn, given)
    still = samplers.Reference(normal=lambda shape, k, tag: np.zeros(shape))
    moved = still(langevin_step, 2, eps=.1)(0, x.numpy(), s.numpy())
    assert np.array_equal(moved, x.numpy() + .05 * s.numpy())


def test_one_op_corrects_in_two_threads():
    """The noise that is kept is a thread's own, and of x's kind."""
    engine, s = kernels.Fused(seed=4, backend="host"), torch.randn(512, 1024)
    correct = engine.corrector(langevin_step, snr_step_size, 4)

    def run(n):
        x = [torch.ones(512, n) for _ in range(4)]
        for k, u in enumerate(x):
            correct(k, u, s[:, :n])
        return x
    want = {n: run(n) for n in (1024, 1000)}
    with ThreadPoolExecutor(2) as pool:
        for n, got in zip([1024, 1000] * 4, pool.map(run, [1024, 1000] * 4)):
            assert all(map(torch.equal, got, want[n]))
    empty = correct(0, np.ones((0, 3), np.float32), np.ones((0, 3), np.float32))
    still = samplers.Reference().corrector(langevin_step, snr_step_size, 4)(
        0, np.ones((0, 3)), np.ones((0, 3)))
    assert empty.shape == still.shape == (0, 3)


def test_a_corrected_loop_follows_the_reference():
    """Float32 against float64 over 20 steps towards N(0, I): each a contraction, so errors of
    2^-24 a step and operand stay below 1e-4."""
    target = Gaussian([0., 0., 0.], 1.)
    def score(x, t):
        return target.noised(*VP().marginal(t)).score(x)
    z, times = samplers.prior((16, 3)), np.linspace(1, .01, 21)
    *_, exact = samplers.predictor_corrector(score, z.astype(float), VP(), times,
                                           samplers.Reference(seed=1))
    *_, fused = samplers.predictor_corrector(lambda x, t: score(x, t).astype(np.float32), z, VP(),
                                           times, kernels.Fused(seed=1, backend="host"))
    assert fused.dtype == np.float32 and np.abs(fused - exact).max() < 1e-4
