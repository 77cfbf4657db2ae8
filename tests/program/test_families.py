"""Every family, from one score: on distributions known exactly, and on kernels."""


import numpy as np
import pytest

from minidiff import families, kernels, noise, samplers, targets
from minidiff.chunks import EVALUATIONS
from minidiff.plot import FLOWS


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_reaches_an_exact_mixture(family):
    """Exact score, 4,096 samples of an off-centre two-mode target within [-1, 1]. Weight within
    6 sigma of a binomial plus .02 for the coarse grids; means within 6 standard errors of the
    mode plus .02."""
    target = targets.Mixture([.3, .7], [[-.6, -.3], [.6, .3]], .01)
    def score(x, sigma):
        return target.noised(1., sigma).score(x)
    z = noise.normal((4096, 2), tag=noise.PRIOR)
    *_, x = families.FAMILIES[family](score, z, 600, samplers.Reference(seed=1))
    left = x[:, 0] < 0
    assert abs(left.mean() - .3) < 6 * (.21 / 4096)**.5 + .02
    for side, mean in ((left, [-.6, -.3]), (~left, [.6, .3])):
        assert np.abs(x[side].mean(0) - mean).max() < 6 * .1 / side.sum()**.5 + .02
        assert np.abs(x[side].std(0) - .1).max() < .02


# evaluations as the README's table has them; how much the std of an end is off .1, the data's
DEMO = {"annealed_langevin": (97, .2441), "ddpm_ancestral": (80, -.0965), "ddim": (40, -.0956),
        "reverse_sde_ve": (80, -.0055), "reverse_sde_vp": (80, .0421),
        "reverse_sde_subvp": (80, .018), "reverse_sde_flow": (80, .0447),
        "reverse_diffusion_ve": (80, .0468),
        "reverse_diffusion_vp": (80, .2072), "ancestral_ve": (79, -.0563), "pc_ve": (79, -.0044),
        "pc_vp": (79, .082), "pc_subvp": (79, .0376), "pf_ode": (40, .0245),
        "flow_matching": (40, -.106), "heun": (39, .0553), "edm_churn": (79, .0354),
        "dpmpp_2m": (20, .0329)}


@pytest.mark.parametrize("family", DEMO)
def test_a_familys_law_on_a_gaussian_at_the_demos_evaluations(family):
    """Its end is linear in the start and in every draw: row 0 of a batch answers the start alone,
    each other row one draw, and the squares add up to the variance. A flow answers no draw."""
    rows, calls = {}, []

    def impulse(shape, k, tag):
        return np.eye(shape[0])[:, [rows.setdefault((k, tag), 1 + len(rows))]]

    def score(x, sigma):
        calls.append(sigma)
        return targets.Gaussian([0.], .01).noised(1., float(sigma)).score(x)
    *_, x = families.FAMILIES[family](score, np.eye(256)[:, :1], EVALUATIONS.get(family, 80),
                                      samplers.Reference(normal=impulse))
    bias = (x**2).sum()**.5 / .1 - 1
    assert (len(calls), round(bias, 4)) == DEMO[family]
    assert (x[1:] != 0).any() == (family not in FLOWS)


@pytest.mark.parametrize("family", ["reverse_diffusion_ve", "ancestral_ve"])
def test_ves_chain_is_scored_at_its_own_levels(family):
    """At the demo's 80 evaluations a mode's deviation .1 is off by .006 at most, the chain's own
    bias; scores of the level one step on would make it .018."""
    target = targets.Gaussian([.3, -.2], .01)
    z = noise.normal((4096, 2), tag=noise.PRIOR)
    *_, x = families.FAMILIES[family](lambda x, sigma: target.noised(1., sigma).score(x), z, 80,
                                      samplers.Reference(seed=1))
    assert np.abs(x.std(0) - .1).max() < .009


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [1, 2, 3, 10])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_family_of_few_evaluations_ends(family, n):
    target = targets.Gaussian([.3, -.2], .01)
    *_, x = families.FAMILIES[family](lambda x, sigma: target.noised(1., sigma).score(x),
                                      noise.normal((8, 2)), n, samplers.Reference(seed=1))
    assert np.isfinite(x).all()


def test_families_on_kernels_follow_the_reference():
    """Float32 states of a fused run beside a float64 one: the DDIM map is a contraction onto the
    data here, so one rounding a step stays below 1e-4 of the data's scale."""
    target = targets.Gaussian([.2, -.1], .04)
    def score(x, sigma):
        return target.noised(1., sigma).score(x).astype(x.dtype)
    z = noise.normal((64, 2), tag=noise.PRIOR)
    *_, fused = families.FAMILIES["ddim"](score, z, 40, kernels.Fused(backend="host"))
    *_, exact = families.FAMILIES["ddim"](score, z.astype(float), 40, samplers.Reference())
    assert fused.dtype == np.float32 and np.abs(fused - exact).max() < 1e-4
