"""The engine that runs loops fused: its moves, its schedules, what it refuses."""

import warnings
from copy import copy
from itertools import islice

import numpy as np
import pytest
import torch

from exact import difference
from minidiff import ddpm, kernels, langevin, noise, samplers, sde, solvers
from minidiff.families import FAMILIES
from minidiff.kernels import Fused, Op, coefficients, fused, update
from minidiff.samplers import Reference

X = np.arange(6, dtype=np.float32).reshape(2, 3)
T = torch.from_numpy(X.copy())
CPU = [name for name in ("numpy", "host") if kernels.why_not(name) is None]


def test_fused_is_each_step_of_the_reference(place):
    """Whole loops: bits equal to NumPy's, and each step within its rounding bound
    (test_rows_are_their_equation) of the equation in float64 at the same state."""
    backend, device = place

    def both(step, tag, steps, **p):
        op = Op(step.__name__, step)
        table, m = coefficients(step, **p), 4 * 2.**-24
        fused, same, exact = (Fused(3, 5, backend)(step, tag, **p),
                              Fused(3, 5, "numpy")(step, tag, **p),
                              Reference(3, 5)(step, tag, **p))

        def move(k, *u):
            got, host = fused(k, *u), [v.cpu() for v in u]
            assert difference(got, same(k, *host)) is None
            host = [v.numpy().astype(np.float64) for v in host]
            z = [noise.normal(host[0].shape, 3, 5, k, tag)] * op.noise
            size = sum(abs(c * v) for c, v in zip(table[k], host + z, strict=True))
            assert (abs(got.cpu().numpy() - exact(k, *host)) <= m / (1 - m) * size).all()
            return got
        return move

    x = torch.from_numpy(samplers.prior((4, 5), seed=3)).to(device)
    times, betas = np.linspace(1, .1, 6), ddpm.linear_betas(5)
    for loop, *arguments in ((samplers.reverse_sde, sde.VP(), times),
                             (samplers.pf_ode, sde.SubVP(), times),
                             (samplers.reverse_diffusion, sde.VP(), 30),
                             (samplers.ancestral, betas), (samplers.ddim, ddpm.alpha_bars(betas))):
        *_, end = islice(loop(lambda x, level: -x, x, *arguments, both), 5)
        assert bool(end.isfinite().all())


def test_fused_takes_a_step_counter(place):
    backend, device = place
    p = {"beta": np.linspace(.1, .2, 4), "variance": np.linspace(.2, .3, 4)}
    move = Fused(3, 5, backend)(ddpm.ancestral_step, noise.PREDICTOR, **p)
    x = torch.from_numpy(noise.normal((3, 6), seed=9)).to(device)
    for k in range(4):
        assert difference(move(torch.tensor(k, device=device), x, -x), move(k, x, -x).cpu()) is None


def test_an_engine_uploads_a_schedule_once():
    """A copy's loop uploads nothing more, so that a CUDA graph can capture it whole."""
    engine, x, times = Fused(backend="torch"), torch.ones(3, 4), [1., .6, .2]
    first = [*samplers.reverse_sde(lambda x, t: -x, x, sde.VP(), times, engine)][-1]
    twin = copy(engine)
    before = {key: rows.coef.data_ptr() for key, rows in engine.tables.items()}
    again = [*samplers.reverse_sde(lambda x, t: -x, x, sde.VP(), times, twin)][-1]
    assert before and before == {k: rows.coef.data_ptr()
                                 for k, rows in twin.tables.items()}
    assert torch.equal(first, again)
    many = engine(langevin.langevin_step, 2, eps=np.linspace(.1, .2, 5))
    for eps in np.linspace(.1, .2, 2 * fused.SCHEDULES):  # bounded, and each its own
        one = engine(langevin.langevin_step, 2, eps=eps)(0, x, -x)
        assert torch.equal(one, update([x, -x], coefficients(langevin.langevin_step, eps=eps),
                                       tag=2, backend="torch"))
    assert len(engine.tables) == fused.SCHEDULES and many(4, x, -x).isfinite().all()


@pytest.mark.parametrize("backend", CPU)
def test_an_engine_counts_operands_at_every_move(backend):
    """One too few would take the score's coefficient for the noise's."""
    move = Fused(backend=backend)(langevin.langevin_step, 2, eps=.1)
    for _ in range(2):
        for u in ((X,), (X, X, X)):
            with pytest.raises(TypeError, match=f"langevin_step takes x, s, got {len(u)}"):
                move(0, *u)
        assert move(0, X, X).shape == X.shape
    given = Fused(backend=backend, normal=lambda shape, k, tag: np.zeros(shape, np.float32))
    with pytest.raises(TypeError, match="takes x, s, got 1"):
        given(langevin.langevin_step, 2, eps=.1)(0, X)


def test_a_schedule_has_one_axis_and_a_step_is_in_it():
    with pytest.raises(ValueError, match="coef has shape"):
        Fused()(langevin.langevin_step, 2, eps=np.full((2, 3), .1))(0, X, X)
    move = Fused()(langevin.langevin_step, 2, eps=np.full(3, .1))
    with pytest.raises(IndexError, match="index 3"):
        move(3, X, X)
    with pytest.raises(TypeError, match="x must be a NumPy array or a torch tensor, got list"):
        move(0, [1.], [1.])


@pytest.mark.parametrize("backend", [None, "numpy", "torch", "host"])
def test_a_row_whose_score_is_0_stays(backend):
    """The rule's step is infinite there. A score that is NaN still makes its row NaN."""
    engine = Fused(0, backend=backend) if backend else Reference(0)
    correct = engine.corrector(langevin.langevin_step, solvers.snr_step_size, noise.CORRECTOR,
                               range(1))
    x, s = np.ones((4, 5), np.float32), np.ones((4, 5), np.float32)
    s[1], s[2], s[3] = 0, np.nan, 1e-30  # whose step of 1e59 is no float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = correct(0, x.copy(), s)
    assert (got[1] == 1).all() and (got[3] == 1).all()
    assert np.isnan(got[2]).all() and np.isfinite(got[0]).all() and (got[0] != 1).all()


@pytest.mark.parametrize("corrector", ["langevin", "batch_langevin", "annealed"])
def test_a_score_of_0_leaves_every_corrector_finite(corrector):
    for engine in (Fused(0), Reference(0)):
        states = samplers.predictor_corrector(
            lambda x, t: 0 * x, samplers.prior((3, 4)), sde.VE(), [1., .5, .1],
            engine, corrector=corrector)
        assert all(np.isfinite(x).all() for x in states)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_keeps_its_precision_through_every_family(family):
    """The score is given, at every step, what the start was: a network takes one dtype."""
    for engine, dtypes in ((Reference, [np.float32, np.float64]),
                           (Fused, [np.float32, torch.bfloat16, torch.float16])):
        for dtype in dtypes:
            given = isinstance(dtype, torch.dtype)
            z = noise.normal((4, 2)).astype(np.float32 if given else dtype)
            z = torch.from_numpy(z).to(dtype) if given else z
            seen = set()

            def score(x, sigma, seen=seen):
                seen.add(x.dtype)
                return -x / (sigma * sigma + .25)
            states = [x.dtype for x in FAMILIES[family](score, z, 24, engine(0))]
            assert seen == {z.dtype} and set(states) == {z.dtype}


def test_a_rule_may_return_a_list():
    op = Fused(backend="numpy")
    rule = lambda z_norm, s_norm: [.1] * len(z_norm)
    got = op.corrector(langevin.langevin_step, rule, 4)(3, X.copy(), X)
    want = kernels.apply("langevin", X, X, eps=np.full(len(X), .1), step=3, tag=4,
                         backend="numpy")
    np.testing.assert_array_equal(got, want)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("backend", ["torch", *CPU])
def test_a_loop_warns_of_nothing(backend):
    move = Fused(backend=backend)(langevin.langevin_step, 2, eps=np.linspace(.1, .2, 4))
    for x in (X, T):
        assert move(3, x, x).shape == x.shape
