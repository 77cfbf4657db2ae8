"""Score matching in torch: the reference's own functions on tensors, and what they train."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minidiff import data, kernels, noise, score_matching
from minidiff.score_matching import explicit
from minidiff.targets import Mixture
from minidiff.train import (
    Trainer,
    batch_indices,
    edm_weight,
    jacobian_objective,
    training_levels,
)

POINTS, IMAGES = data.load("mixture").train, noise.normal((16, 1, 4, 4), seed=5)
PLANE = Mixture([.3, .7], [[-1., .5], [1., -.5]], [.3, .5])
OBJECTIVES = pytest.mark.parametrize("name", ["implicit", "sliced", "sliced_vr"])


def network(width=32):
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Tanh(),
                               torch.nn.Linear(width, width), torch.nn.Tanh(),
                               torch.nn.Linear(width, 2)).double()


def jacobian(net, x):
    """(B, 2, 2), a row of it at a time by backward passes."""
    leaf = x.clone().requires_grad_()
    s = net(leaf)
    return torch.stack([torch.autograd.grad(s[:, k].sum(), leaf, retain_graph=True)[0]
                        for k in range(2)], 1).detach().numpy()


@OBJECTIVES
def test_an_objective_in_torch_is_the_numpy_reference(name):
    net, x = network(), torch.from_numpy(PLANE.sample(32, seed=1))
    v = noise.rademacher((32, 2), seed=2, tag=noise.PROBE).astype(float)
    weight = np.linspace(1, 3, 32)
    got = jacobian_objective(name, net, x, *map(torch.from_numpy, (v, weight)))
    s, J = net(x).detach().numpy(), jacobian(net, x)
    args = (np.trace(J, axis1=1, axis2=2),) if name == "implicit" else \
        (v, np.einsum("bij,bj->bi", J, v))
    want = getattr(score_matching, name)(s, *args, weight)
    assert got.item() == pytest.approx(want, rel=1e-13)
    assert got.requires_grad


@OBJECTIVES
@pytest.mark.parametrize("x", [POINTS, IMAGES], ids=["points", "images"])
def test_a_trainer_fits_by_any_objective(name, x):
    """Its value is the NumPy function's of the network's scores and Jacobian, sample by sample,
    weighed and a mean over elements: float32 against float64, of terms that cancel in part."""
    run = Trainer(x, kernels, 5, batch=3, seed=2, objective=name)
    torch.nn.init.normal_(run.net.F_x.out.weight, std=.1)
    x0 = torch.from_numpy(x[batch_indices(len(x), 3, 2, 0)])
    assert run.weighting == "sigma2"
    sigma, weight = training_levels(3, 2, 0, "sigma2")
    x = kernels.apply("perturb", x0, a=1., sigma=sigma, seed=2, tag=noise.PERTURBATION)
    net, size = run.net.double(), x[0].numel()
    s, J = [], []
    for row, level in zip(x.double(), torch.from_numpy(sigma)):
        def score(u, like=row[None], level=level):
            return net(u.reshape(like.shape), level[None]).flatten()
        s.append(score(row).detach().numpy())
        J.append(torch.autograd.functional.jacobian(score, row.flatten()).numpy())
    s, J, net = np.stack(s), np.stack(J), run.net.float()
    v = noise.rademacher((3, size), 2, tag=noise.PROBE).astype(float)
    args = (np.trace(J, axis1=1, axis2=2),) if name == "implicit" else \
        (v, np.einsum("bij,bj->bi", J, v))
    want = getattr(score_matching, name)(s, *args, weight / size)
    value, loss, gradient = run.objective()
    assert loss.item() == pytest.approx(want, rel=1e-4) and gradient is None
    before = [p.clone() for p in net.parameters()]
    run.advance()
    assert any((p != old).any() for p, old in zip(net.parameters(), before))


def test_denoising_in_torch_is_the_numpy_reference():
    x, z = PLANE.sample(32, seed=1), noise.normal((32, 2), seed=3).astype(float)
    sigma, weight = np.linspace(.1, 2, 32)[:, None], np.linspace(1, 3, 32)
    got = score_matching.denoising(*map(torch.from_numpy, (x, z, sigma, weight)))
    assert got.item() == pytest.approx(score_matching.denoising(x, z, sigma, weight), rel=1e-14)


@OBJECTIVES
def test_an_objective_trains_a_network_towards_the_score(name):
    """2,048 points, 200 steps of Adam: J = 1/2 E|s - score|^2 falls below a twentieth of that of
    s = 0, half the Fisher information; measured 1/32, 1/27 and 1/30."""
    net, x = network(), torch.from_numpy(PLANE.sample(2048, seed=1))
    adam = torch.optim.Adam(net.parameters(), lr=5e-3)
    for k in range(200):
        v = noise.rademacher((2048, 2), seed=4, step=k, tag=noise.PROBE).astype(float)
        loss = jacobian_objective(name, net, x, torch.from_numpy(v))
        adam.zero_grad()
        loss.backward()
        adam.step()
    score, s = PLANE.score(x.numpy()), net(x).detach().numpy()
    assert explicit(s, score) < explicit(0 * s, score) / 20


@pytest.mark.parametrize("weighting", ["edm", "sigma2", "likelihood", "flow"])
def test_training_levels_weigh_as_they_say(weighting):
    """In the network's variable x0 + sigma z the likelihood's g^2 ... is Z sigma^2 with ln sigma
    uniform between the ends of VP; flow matching's is that of |v - (z - x0)|^2 at uniform times;
    sigma^2 is SMLD's; EDM's is that of |D - x0|^2."""
    sigma, weight = training_levels(2**14, 1, 0, weighting)
    ends = np.log([1e-3, 152.1])
    if weighting == "flow":  # KS distance of t / T from the uniform, alpha 1e-6
        t = sigma / (1 + sigma)
        u = np.sort(t / .999)
        assert np.abs(u - (np.arange(2**14) + .5) / 2**14).max() < (np.log(2e6) / 2**15)**.5
        rng = np.random.default_rng(1)
        x0, z, s = rng.standard_normal((3, 2**14))  # any s at all is a model's
        x_t = (1 - t) * x0 + t * z
        v = -(x_t + t * s) / (1 - t)
        # s is the score of x_t, and (1 - t) s that of x_t / (1 - t) = x0 + sigma z
        loss = weight * ((1 - t) * s + z / sigma)**2
        # rounding of two terms that cancel, both of the size of z / (1 - t)
        np.testing.assert_allclose(loss, (v - (z - x0))**2, rtol=1e-9, atol=1e-9)
    elif weighting == "likelihood":  # KS distance of ln sigma from the uniform, alpha 1e-6
        u = np.sort((np.log(sigma) - ends[0]) / (ends[1] - ends[0]))
        assert np.abs(u - (np.arange(2**14) + .5) / 2**14).max() < (np.log(2e6) / 2**15)**.5 + 1e-3
        np.testing.assert_allclose(weight / sigma**2, 2 * (ends[1] - ends[0]), rtol=1e-4)
    else:
        assert abs(np.log(sigma).mean() + 1.2) < 4.9 * 1.2 / 2**7
        edm = (sigma**2 + .25) / (sigma * .5)**2 * sigma**4  # |D - x0|^2 = sigma^4 |s - ..|^2
        np.testing.assert_allclose(weight, edm if weighting == "edm" else sigma**2, rtol=1e-14)


def test_a_larger_image_is_hidden_by_larger_noise():
    """Levels are 28 / 8 times as large for 28 by 28 as for 8 by 8; smaller images and points
    have the usual ones. A trainer perturbs by them."""
    seen = []

    def apply(name, x0, a, sigma, **draw):
        seen.append(sigma)
        return kernels.apply(name, x0, a=a, sigma=sigma, **draw)
    asked = SimpleNamespace(apply=apply, dsm_loss=kernels.dsm_loss)
    usual, _ = training_levels(4, 7, 0)
    for shape, times in (((1, 28, 28), 3.5), ((3, 16, 16), 2.), ((1, 8, 8), 1.), ((1, 4, 6), 1.),
                         ((1, 32, 8), 2.), ((2,), 1.)):
        x = noise.normal((8, *shape), 3)
        Trainer(x, asked, 5, batch=4, seed=7).objective()
        np.testing.assert_allclose(seen[-1], times * usual, rtol=1e-14)
        sigma, weight = training_levels(4, 7, 0, shift=np.log(times))
        np.testing.assert_allclose(sigma, seen[-1], rtol=1e-14)
        np.testing.assert_array_equal(weight, edm_weight(sigma))


@pytest.mark.parametrize("shape, usual", [((2,), (3000, 512)), ((1, 8, 8), (1250, 128)),
                                          ((3, 16, 16), (1250, 128)), ((1, 28, 28), (4000, 32))])
def test_a_training_is_as_long_as_its_samples_need(shape, usual):
    x = np.zeros((600, *shape), np.float32)
    run = Trainer(x, kernels)
    assert (run.steps, run.batch) == usual
