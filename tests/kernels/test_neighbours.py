"""Noise for k-diffusion's samplers and diffusers' pipelines, run in what is installed."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from minidiff import noise, targets
from minidiff.kernels.neighbours import NoiseSampler, latents

SEEDS = [3, 1, 2**63 + 4]
DATA = targets.Mixture([.3, .7], [[-.6, -.3], [.6, .3]], .01)


@pytest.fixture(scope="module")
def sampling():
    """k_diffusion.sampling, without the rest of that package: it imports libraries of training
    and of images, which no sampler calls."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None:
        pytest.skip("k-diffusion is not installed")
    package = ModuleType("k_diffusion")
    package.__path__ = found.submodule_search_locations
    images = {"torchvision": ModuleType("torchvision"),
              "torchvision.transforms": SimpleNamespace(functional=None)}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in {"k_diffusion": package, **images}.items():
            patch.setitem(sys.modules, name, module)
        return importlib.import_module("k_diffusion.sampling")


def model(x, sigma):
    """The denoiser that is exact for N(0, 1/4), each element by itself."""
    return x * (.25 / (.25 + sigma**2)).reshape(-1, *[1] * (x.ndim - 1))


RUNS = ["sample_euler_ancestral", "sample_dpm_2_ancestral", "sample_dpmpp_2s_ancestral",
        "sample_dpmpp_sde", "sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"]


def run(sampling, name, seeds, dtype=torch.float32):
    sigmas = sampling.get_sigmas_karras(12, .02, 10.)
    pipe = SimpleNamespace(device=torch.device("cpu"), dtype=dtype)
    x = latents(pipe, (3, 4), seeds) * sigmas[0]
    draw = NoiseSampler(x, seeds)
    return getattr(sampling, name)(model, x, sigmas, noise_sampler=draw, disable=True), draw


@pytest.mark.parametrize("name", RUNS)
def test_k_diffusion_makes_a_sample_again_alone_and_in_any_batch(sampling, name):
    """Bit for bit: the sampler's and this model's operations are elementwise."""
    batch, draw = run(sampling, name, SEEDS)
    assert draw.calls >= 10 and torch.isfinite(batch).all()
    assert not (batch[0] == batch[1]).any()
    for k, seed in enumerate(SEEDS):
        alone, _ = run(sampling, name, [seed])
        assert (alone[0] == batch[k]).all()
    shuffled, _ = run(sampling, name, SEEDS[::-1])
    assert (shuffled.flip(0) == batch).all()
    # what k-diffusion does by itself is another sample each time
    torch.manual_seed(0)
    sigmas = sampling.get_sigmas_karras(12, .02, 10.)
    own = [sampling.sample_euler_ancestral(model, torch.ones(n, 3, 4), sigmas, disable=True)[-1]
           for n in (1, 2)]
    assert (own[0] != own[1]).any()


def test_steps_that_are_the_batchs_are_not_a_samples_own(sampling):
    """sample_dpm_fast has the same steps for all; sample_dpm_adaptive's follow from the batch."""
    def end(loop, seeds, **steps):
        x = 10 * latents(SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32),
                         (3, 4), seeds)
        return loop(model, x, .02, 10., **steps, eta=1., disable=True,
                    noise_sampler=NoiseSampler(x, seeds))
    whole, alone = (end(sampling.sample_dpm_fast, seeds, n=12) for seeds in (SEEDS, SEEDS[:1]))
    assert (whole[:1] == alone).all()
    whole, alone = (end(sampling.sample_dpm_adaptive, seeds) for seeds in (SEEDS, SEEDS[:1]))
    assert not (whole[:1] == alone).all()


def test_its_ancestral_samples_have_the_datas_law(sampling):
    """4,096 seeds of a mixture: weight, means and deviations of its modes, as our families."""
    seeds = list(range(4096))
    sigmas = sampling.get_sigmas_karras(200, .01, 20.)

    def denoiser(x, sigma):
        s = DATA.noised(1., float(sigma[0])).score(x.double().numpy())
        return x + float(sigma[0])**2 * torch.tensor(s, dtype=x.dtype)
    pipe = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    x = latents(pipe, (2,), seeds) * 20
    x = sampling.sample_euler_ancestral(denoiser, x, sigmas, noise_sampler=NoiseSampler(x, seeds),
                                        disable=True).numpy()
    left = x[:, 0] < 0
    # 6 standard errors, and .02 for the bias of 200 steps, as in test_families
    assert abs(left.mean() - .3) < 6 * (.21 / 4096)**.5 + .02
    for side, mean in ((left, [-.6, -.3]), (~left, [.6, .3])):
        assert np.abs(x[side].mean(0) - mean).max() < 6 * .1 / side.sum()**.5 + .02
        assert np.abs(x[side].std(0) - .1).max() < .02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_draw_is_the_contracts_and_like_x(dtype):
    x = torch.zeros(3, 5, dtype=dtype)
    draw = NoiseSampler(x, SEEDS)
    for step, sigma in enumerate((4., 4., 1.)):
        z = draw(torch.tensor(sigma), torch.tensor(.5))
        assert z.dtype == dtype and z.shape == x.shape
        want = noise.normal((3, 5), SEEDS, [0] * 3, step, noise.PREDICTOR)
        assert (z == torch.from_numpy(want).to(dtype)).all()


def test_an_object_serves_one_run():
    draw = NoiseSampler(torch.zeros(1, 2), [3])
    draw(2., 1.)
    draw(1., .5)
    with pytest.raises(ValueError, match="sigma rises to 2.0: each run takes its own object"):
        draw(torch.tensor(2.), torch.tensor(1.))
    assert draw.calls == 2


def test_seeds_that_are_not_one_a_sample_are_refused():
    """Of one number the rows would be its ids, so that no row could be drawn alone."""
    pipe = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"seed has shape \(2,\), not \(3,\)"):
        NoiseSampler(torch.zeros(3, 2), [1, 2])(2., 1.)
    for one in 7, np.int64(7), torch.tensor(7):
        with pytest.raises(TypeError, match="seeds must be a list, a seed a sample, got"):
            NoiseSampler(torch.zeros(2, 2), one)
        with pytest.raises(TypeError, match="seeds must be a list, a seed a sample, got"):
            latents(pipe, (2,), one)
    with pytest.raises(TypeError, match="seeds must be an integer"):
        NoiseSampler(torch.zeros(2, 2), [1, .5])


def test_seeds_are_kept_as_they_were():
    seeds = [1, 2]
    draw = NoiseSampler(torch.zeros(2, 2), seeds)
    before = draw(2., 1.)
    seeds[0] = 9
    assert (NoiseSampler(torch.zeros(2, 2), [1, 2])(2., 1.) == before).all()
    again = NoiseSampler(torch.zeros(2, 2), torch.tensor([1, 2]))
    again(2., 1.)
    assert (again(1., .5) == draw(1., .5)).all()


# ---- diffusers ----

@pytest.fixture(scope="module")
def pipe():
    """A small pipeline with random weights, whose sampler adds noise at the start alone."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(sample_size=8, in_channels=3, out_channels=3, layers_per_block=1,
                                block_out_channels=(32,), down_block_types=("DownBlock2D",),
                                up_block_types=("UpBlock2D",), norm_num_groups=8)
    made = diffusers.ConsistencyModelPipeline(net, diffusers.CMStochasticIterativeScheduler())
    made.set_progress_bar_config(disable=True)
    return made


def images(pipe, seeds):
    x = latents(pipe, (3, 8, 8), seeds)
    return pipe(batch_size=len(seeds), latents=x, num_inference_steps=1, output_type="pt").images


def test_a_pipeline_makes_an_image_again_alone_and_in_a_batch(pipe):
    """Its network rounds differently in another batch, some 1e-6 of its float32 images; other
    noise moves them by tenths."""
    batch = images(pipe, SEEDS)
    for k, seed in enumerate(SEEDS):
        alone = images(pipe, [seed])
        torch.testing.assert_close(alone[0], batch[k], rtol=0, atol=1e-4)
    assert (batch[0] - batch[1]).abs().max() > .1
    own = [pipe(batch_size=n, generator=torch.Generator().manual_seed(3), num_inference_steps=1,
                output_type="pt").images[-1] for n in (1, 2)]
    assert (own[0] - own[1]).abs().max() > .1  # of one generator a batch


@pytest.mark.parametrize("kind", ["cpu", "cuda", "meta", "mps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_latents_are_one_seeds_wherever_the_pipeline_is(kind, dtype):
    """A pipeline that is offloaded says "meta"; it moves what it is given."""
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    where = SimpleNamespace(device=torch.device(kind), dtype=dtype)
    x = latents(where, (2, 4), SEEDS)
    assert x.device.type == ("cuda" if kind == "cuda" else "cpu") and x.dtype == dtype
    want = torch.from_numpy(noise.normal((3, 2, 4), SEEDS, [0] * 3, tag=noise.PRIOR)).to(dtype)
    assert (x.cpu() == want).all()


def test_a_draw_on_a_gpu_is_the_cpus():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    on_cpu, on_gpu = (NoiseSampler(torch.zeros(3, 5, device=d), SEEDS) for d in ("cpu", "cuda"))
    for _ in range(3):
        assert (on_gpu(2., 1.).cpu() == on_cpu(2., 1.)).all()
