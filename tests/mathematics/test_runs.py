"""An engine is one run: it draws no noise twice, and a chain in pieces is the chain."""

from concurrent.futures import ThreadPoolExecutor
from inspect import isgeneratorfunction, signature

import numpy as np
import pytest

from minidiff import ddpm, kernels, langevin, noise, samplers, sde
from minidiff.engine import Engine
from minidiff.kernels import Fused
from minidiff.samplers import Reference

X = noise.normal((4, 3), seed=7)
VP = sde.VP()
TIMES = np.linspace(.6, .1, 13)
LEVELS = np.geomspace(10., .1, 12)
ENGINES = [Reference, lambda *given: Fused(*given, backend="numpy")]
LOOPS = {
    "iterate": lambda part, engine, **kw: samplers.iterate(
        langevin.langevin_step, score, part[0], LEVELS[part[1]], engine,
        eps=np.linspace(.1, .2, 12)[part[1]], **kw),
    "langevin": lambda part, engine, **kw: samplers.langevin(
        lambda x: -x, part[0], part[1].stop - part[1].start, engine,
        eps=np.linspace(.1, .2, 12)[part[1]], **kw),
    "reverse_sde": lambda part, engine, **kw: samplers.reverse_sde(
        score, part[0], VP, grid(part[1]), engine, **kw),
    "ancestral steps of a VE chain": lambda part, engine, **kw: samplers.iterate(
        sde.ancestral_step, score, part[0], LEVELS[part[1]], engine, sde=sde.VE(),
        i=np.arange(12)[::-1][part[1]], n=12, **kw),
    "forward_sde": lambda part, engine, **kw: samplers.forward_sde(
        part[0], VP, 1.1 - grid(part[1]), engine, **kw),
    "edm": lambda part, engine, **kw: samplers.edm(
        score, part[0], LEVELS[part[1]], engine, s_churn=len(LEVELS[part[1]]) * .4, **kw),
    "predictor_corrector": lambda part, engine, **kw: samplers.predictor_corrector(
        score, part[0], VP, grid(part[1]), engine, n_corrector=2, **kw)}
WHOLE = slice(0, 12)


def score(x, level):
    return -x


def grid(part):
    """The times of a piece, its last one too."""
    return TIMES[part.start:part.stop + 1]


def same(states, others):
    assert len(states) == len(others)
    for a, b in zip(states, others):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("make", ENGINES, ids=["Reference", "Fused"])
@pytest.mark.parametrize("pieces", [(5,), (1, 2, 11), tuple(range(1, 12))], ids=len)
@pytest.mark.parametrize("loop", set(LOOPS) - {"edm"})  # its last step is to 0
def test_a_chain_in_pieces_is_the_chain(loop, pieces, make):
    run = LOOPS[loop]
    whole = [*run((X.copy(), WHOLE), make(3))]
    engine, x, found = make(3), X.copy(), []
    for start, stop in zip((0, *pieces), (*pieces, 12)):
        states = [s.copy() for s in run((x, slice(start, stop)), engine, first_step=start)]
        found += states
        x = states[-1].copy()
    same(found, [s.copy() for s in whole])


@pytest.mark.parametrize("make", ENGINES, ids=["Reference", "Fused"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_second_loop_on_an_engine_is_refused_and_told_how_to_go_on(loop, make):
    run, engine = LOOPS[loop], make(3)
    list(run((X.copy(), WHOLE), engine))
    told = (r"^this engine has drawn \w+ steps 0–11\. Go on: first_step=12\. Other samples: a new "
            r"engine with sample= or seed=\. The same noise again: a new engine\.$")
    for first_step in (0, 5, 11):
        with pytest.raises(ValueError, match=told):
            list(run((X.copy(), WHOLE), engine, first_step=first_step))
    list(run((X.copy(), WHOLE), engine, first_step=12))
    with pytest.raises(ValueError, match="steps 0–23. Go on: first_step=24"):
        list(run((X.copy(), WHOLE), engine))


@pytest.mark.parametrize("loop", [
    f for name, f in vars(samplers).items()
    if isgeneratorfunction(f) and name[0] != "_" and f.__module__ == samplers.__name__
    and name != "iterate"], ids=lambda f: f.__name__)
def test_a_loops_keywords_are_spelled_out(loop):
    """help() shows them, and a wrong one names the loop that was called."""
    parameters = signature(loop).parameters
    assert not [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    given = [None for p in parameters.values() if p.default is p.empty]
    with pytest.raises(TypeError, match=rf"^{loop.__name__}\(\) got an unexpected keyword.*'sed'"):
        loop(*given, sed=1)


def test_first_step_shifts_the_noise_alone():
    """Levels and parameters count from 0: step k draws what the chain's 100 + k would."""
    eps = np.linspace(.1, .2, 3)
    x = X.astype(float)
    got = [*samplers.iterate(langevin.langevin_step, score, x, np.ones(3), Reference(3),
                             first_step=100, eps=eps)]
    for k in range(3):
        z = noise.normal(X.shape, 3, 0, 100 + k, noise.PREDICTOR)
        x = langevin.langevin_step(x, -x, z, eps[k])
        np.testing.assert_array_equal(got[k], x)


def test_forth_and_back_with_one_engine():
    """Each purpose has its tag, so that one seed serves both."""
    x = noise.normal((20000, 1), 7).astype(float)
    engine = Reference(0)
    up = np.linspace(1e-3, .3, 101)
    *_, xt = samplers.forward_sde(x, VP, up, engine)
    *_, y = samplers.reverse_sde(score, xt, VP, up[::-1], engine)
    # of 20,000 samples the variance is uncertain by sqrt(2 / 20000) = .01
    assert abs(y.var() - 1) < .05
    with pytest.raises(ValueError, match="has drawn PREDICTOR steps 0–99"):
        list(samplers.iterate(langevin.langevin_step, score, y, np.ones(5), engine, eps=.1))


def test_a_chain_in_twenty_pieces_has_the_chains_variance():
    """1 / (1 - eps / 4); the same five draws again and again would give 7.98."""
    y, engine = noise.normal((20000, 1), 7).astype(float), Reference(0)
    for piece in range(20):
        *_, y = samplers.iterate(langevin.langevin_step, score, y, np.ones(5), engine,
                                 first_step=5 * piece, eps=.1)
    assert abs(y.var() - 1 / (1 - .1 / 4)) < .05


# ---- what is claimed, and what is not ----

def test_what_draws_nothing_is_claimed_by_nobody():
    """eta = 0, no churn, the flow: again and again on one engine."""
    engine = Reference(3)
    alpha_bar = ddpm.alpha_bars(ddpm.linear_betas(8))
    for loop, *given in ((samplers.ddim, alpha_bar), (samplers.edm, LEVELS),
                         (samplers.pf_ode, VP, 9), (samplers.heun, VP, 9),
                         (samplers.dpmpp_2m, LEVELS)):
        runs = [[*loop(score, X, *given, engine)] for _ in range(2)]
        same(*runs)
    assert not engine.claimed
    list(samplers.ddim(score, X, alpha_bar, engine, eta=.5))
    with pytest.raises(ValueError, match="PREDICTOR steps 0–7"):
        list(samplers.ddim(score, X, alpha_bar, engine, eta=.5))


def test_moves_by_hand_and_noise_of_ones_own_claim_nothing():
    by_hand = Reference(3)
    for _ in range(2):
        move = by_hand(langevin.langevin_step, noise.PREDICTOR, eps=.1)
        same(move(0, X, X), move(0, X, X))
    assert not by_hand.claimed
    for make in (Reference, Fused):
        asked = []
        mine = make(normal=lambda shape, k, tag, asked=asked: asked.append(k) or X)
        for _ in range(2):
            list(LOOPS["iterate"]((X, WHOLE), mine, first_step=4))
        assert not mine.claimed and asked == [*range(4, 16)] * 2


def test_a_loop_claims_before_it_draws_and_no_sooner():
    engine = Reference(3)
    states = LOOPS["iterate"]((X, WHOLE), engine)
    assert not engine.claimed
    next(states)
    assert engine.claimed == {noise.PREDICTOR: [range(12)]}
    drawn = []
    counted = lambda x, level: drawn.append(level) or -x
    with pytest.raises(ValueError, match="steps 0–11"):
        next(samplers.iterate(langevin.langevin_step, counted, X, LEVELS, engine, eps=.1))
    assert not drawn


def test_steps_may_be_claimed_in_any_order():
    engine = Engine()
    for first in (40, 0, 20, 10, 30):
        assert engine.claim(noise.CHURN, range(first, first + 10)) == first
    with pytest.raises(ValueError, match="CHURN steps .*Go on: first_step=50"):
        engine.claim(noise.CHURN, range(49, 60))
    assert engine.claim(noise.CHURN, range(50, 60)) == 50
    assert engine.claim(noise.PREDICTOR, range(0, 10)) == 0
    for tag, name in ((noise.CORRECTOR, "CORRECTOR"), (noise.CORRECTOR + 2, r"CORRECTOR \+ 2"),
                      (13, "tag 13")):
        engine.claim(tag, range(3))
        with pytest.raises(ValueError, match=f"drawn {name} steps 0–2"):
            engine.claim(tag, range(3))


def test_one_of_many_threads_gets_a_step():
    engine = Engine()

    def claim(i):
        try:
            return engine.claim(2, range(5, 9)) == 5
        except ValueError:
            return False
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(claim, range(200))) == 1


@pytest.mark.parametrize("first_step, error, words", [
    (-1, ValueError, "first_step: steps are counted from 0"),
    (2**32 - 3, ValueError, r"first_step: steps are counted from 0 to 2\^32 - 1"),
    (1.5, TypeError, "first_step must be an int, got 1.5"),
    ("3", TypeError, "first_step must be an int"), (None, TypeError, "first_step must be an int")])
def test_a_first_step_that_is_none_is_refused(first_step, error, words):
    for loop in LOOPS.values():
        with pytest.raises(error, match=words):
            next(loop((X.copy(), WHOLE), Reference(), first_step=first_step))
    last = 2**32 - 12
    list(LOOPS["iterate"]((X.copy(), WHOLE), Reference(), first_step=last))
    with pytest.raises(ValueError, match="steps are counted from 0"):
        list(LOOPS["iterate"]((X.copy(), WHOLE), Reference(), first_step=last + 1))


@pytest.mark.parametrize("make", ENGINES, ids=["Reference", "Fused"])
def test_each_corrector_claims_its_own_steps(make):
    engine = make(3)
    list(LOOPS["predictor_corrector"]((X.copy(), WHOLE), engine))
    assert engine.claimed == {tag: [range(12)] for tag in (
        noise.CORRECTOR, noise.CORRECTOR + 1, noise.PREDICTOR)}


@pytest.mark.parametrize("make", ENGINES, ids=["Reference", "Fused"])
def test_what_the_message_says_goes_on(make):
    """A loop to the data, whose last step is not corrected, and after other loops."""
    engine = make(3)
    run = lambda first_step: [*samplers.predictor_corrector(
        score, X.copy(), VP, 30, engine, first_step=first_step)]
    list(samplers.iterate(langevin.langevin_step, score, X, np.ones(5), engine, eps=.1))
    with pytest.raises(ValueError, match=r"PREDICTOR steps 0–4\. Go on: first_step=5\."):
        run(0)
    assert noise.CORRECTOR not in engine.claimed
    run(5)
    for first_step in (0, 5, 34):
        with pytest.raises(ValueError, match=r"Go on: first_step=35\."):
            run(first_step)
    run(35)
    assert engine.claimed == {noise.PREDICTOR: [range(65)], noise.CORRECTOR: [range(5, 65)]}


@pytest.mark.parametrize("steps", [range(0, 9, 2), range(9, 0, -1), [0, 1], 5])
def test_steps_are_a_range_one_after_the_other(steps):
    with pytest.raises(ValueError, match="steps must be a range, one after the other"):
        Reference()(langevin.langevin_step, 2, steps, eps=.1)


def test_a_first_step_of_a_narrow_integer_does_not_wrap():
    engine = Reference()
    list(samplers.iterate(langevin.langevin_step, score, X, np.ones(10), engine,
                          first_step=np.uint8(250), eps=.1))
    assert engine.claimed == {noise.PREDICTOR: [range(250, 260)]}


def test_default_tags_keep_a_prior_and_a_perturbation_apart():
    z = kernels.normal((20000, 1), seed=0)
    assert abs(kernels.apply("perturb", z, a=.6, sigma=.8, seed=0).var() - 1) < .05
