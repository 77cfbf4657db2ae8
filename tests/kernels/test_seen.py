"""The coefficients that `apply` keeps: of rows and numbers, bounded, and never another's."""

import gc
import weakref

import numpy as np
import pytest

from minidiff import kernels, sde
from minidiff.kernels import OPS, apply
from minidiff.kernels.table import KEPT, _kept, seen

X = np.ones((2, 3), np.float32)


def kept():
    """How many rows of coefficients are kept."""
    return _kept.cache_info().currsize


@pytest.fixture(autouse=True)
def _nothing_kept():
    _kept.cache_clear()


@pytest.mark.parametrize("name", OPS)
def test_what_is_kept_are_the_rows_own_coefficients(name):
    op, rng = OPS[name], np.random.default_rng(3)
    parameters = {n: v.item() if isinstance(v, np.generic) else v
                  for n, v in op.parameters(rng).items()}
    want = op.coefficients(**parameters).astype(np.float32)
    for _ in range(2):
        got = seen(op, None, parameters)
        np.testing.assert_array_equal(np.asarray(got, np.float32), want)
    assert (kept(), _kept.cache_info().hits) == ((0, 0) if op.denoise else (1, 1))


def test_equal_numbers_that_are_others_have_their_own():
    """3 equals 3.0, which is no index; two processes may have the same numbers."""
    chain = {"sde": sde.VE(), "i": 3, "n": 100}
    seen(OPS["reverse_diffusion"], None, chain)
    with pytest.raises(ValueError, match="i must be a whole number"):
        seen(OPS["reverse_diffusion"], None, chain | {"i": 3.})
    vp, sub_vp = (seen(OPS["pf_ode"], None, {"sde": s, "t": .5, "dt": .1})
                  for s in (sde.VP(), sde.SubVP()))
    assert (vp != sub_vp).any()


@pytest.mark.parametrize("name, zero", [
    ("ddim", "eta"), ("ddpm_ancestral", "variance"), ("ddpm_clipped", "variance"),
    ("forward_sde", "t"), ("reverse_sde", "t"), ("pf_ode", "t")])
def test_either_zero_gives_the_same_row(name, zero):
    """So one may stand for the other, bit for bit."""
    op = OPS[name]
    parameters = op.parameters(np.random.default_rng(4))
    plus, minus = (op.coefficients(**parameters | {zero: v}).tobytes() for v in (0., -0.))
    assert plus == minus


def test_what_is_not_a_number_is_not_kept():
    op = OPS["langevin"]
    for eps in (np.array([.1, .2]), np.float32(.1)):
        seen(op, None, {"eps": eps})
    apply(lambda x, s, z, /, g: x + g * s + g * z, X, X, g=.1)

    class Mine(sde.VP):
        """A process of a user's, which may hold more than numbers."""
    seen(OPS["pf_ode"], None, {"sde": Mine(), "t": .5, "dt": .1})
    p = {"alpha_bar": .3, "alpha_bar_prev": .6, "variance": 0.}
    seen(OPS["ddpm_clipped"], (-1., 1.), p)
    assert kept() == 0


def test_a_refused_parameter_is_refused_again():
    for _ in range(2):
        with pytest.raises(ValueError, match="eps"):
            apply("langevin", X, X, eps=-1.)
    assert kept() == 0


def test_it_is_bounded():
    for eps in np.linspace(.01, .1, 2 * KEPT).tolist():
        seen(OPS["langevin"], None, {"eps": eps})
    assert kept() == KEPT


def test_no_closure_is_kept_alive():
    def once():
        big = np.zeros(10**6)
        alive = weakref.ref(big)
        apply(lambda x, s, z, /, g: x + g * s + g * big[0] * z, X, X, g=.1)
        kernels.Fused()(lambda x, s, z, /, g: x + g * s + g * big[0] * z, 2, g=.1)(0, X, X)
        return alive
    alive = [once() for _ in range(3)]
    gc.collect()
    assert not any(a() is not None for a in alive)


def test_a_row_by_its_function_is_the_row():
    by_name = apply("langevin", X, X, eps=.1, seed=1)
    by_function = apply(OPS["langevin"].step, X, X, eps=.1, seed=1)
    np.testing.assert_array_equal(by_name, by_function)
    assert kept() == 1
