"""A seed and an id a row: a row's noise is its own, whatever batch it is in."""

from copy import copy, deepcopy
from itertools import permutations
from pickle import dumps, loads

import numpy as np
import pytest
import torch

from minidiff import kernels, langevin, noise, samplers, sde, solvers
from minidiff.families import FAMILIES
from minidiff.kernels import Fused
from minidiff.targets import Mixture

SEEDS = [3, 2**63 + 5, -2, 1, 1, 2**40]
IDS = [0, 7, 2**32 - 1, 7, 8, 2**33 + 7]
CPU = [name for name in ("numpy", "torch", "host") if kernels.why_not(name) is None]
SIZES = [(1,), (2,), (3,), (4,), (7,), (33,), (1024,), (4099,), (2, 3, 5)]


def alone(shape, seed, sample=None, **counter):
    """Each row's noise by two numbers, in a call of its own."""
    ids = [0] * len(seed) if sample is None else sample
    return np.concatenate([noise.normal((1, *shape), a, b, **counter)
                           for a, b in zip(seed, ids, strict=True)])


# ---- the reference ----

@pytest.mark.parametrize("draw", [noise.words, noise.normal, noise.uniform, noise.rademacher])
def test_a_row_is_what_its_two_numbers_give_alone(draw):
    for seed, sample, names in (
            (SEEDS, 0, zip(SEEDS, [0] * 6)), (SEEDS, IDS, zip(SEEDS, IDS)),
            (-2, IDS, zip([-2] * 6, IDS)), (2**64 - 2, IDS, zip([-2] * 6, IDS))):
        got = draw((6, 5), seed, sample, 9, 4)
        want = [draw((1, 5), a, b, 9, 4) for a, b in names]
        np.testing.assert_array_equal(got, np.concatenate(want))


@pytest.mark.parametrize("kind", [
    tuple, lambda v: np.array([i % 2**64 for i in v], np.uint64),
    lambda v: np.array([i % 2**64 for i in v], np.uint64).astype(np.int64),
    lambda v: np.array([i % 2**64 for i in v], ">u8"),
    lambda v: np.array([i % 2**64 for i in v], np.uint64).repeat(2)[::2],
    lambda v: torch.tensor([noise.signed(i, 64) for i in v]),
    lambda v: torch.tensor([noise.signed(i, 64) for i in v]).view(torch.uint64),
    lambda v: [np.int64(noise.signed(i, 64)) for i in v]],
    ids=["tuple", "uint64", "int64", "big-endian", "strided", "tensor", "uint64 tensor", "numbers"])
def test_integers_of_any_kind_are_taken(kind):
    want = alone((5,), SEEDS, IDS)
    np.testing.assert_array_equal(noise.normal((6, 5), kind(SEEDS), kind(IDS)), want)
    for backend in CPU:
        got = kernels.normal((6, 5), seed=kind(SEEDS), sample=kind(IDS), backend=backend)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int32", "uint32"])
def test_narrow_integers_count_as_what_they_are(kind):
    """Signed ones by their sign: -1 is 2^64 - 1."""
    small = [3, 127, 0, 1, 1, 2]
    if kind.startswith("int"):
        small = [-i for i in small]
    want = alone((5,), small)
    for made in (np.array(small, kind), torch.tensor(small, dtype=getattr(torch, kind))):
        np.testing.assert_array_equal(noise.normal((6, 5), made), want)
        got = kernels.normal((6, 5), seed=made, backend="torch")
        np.testing.assert_array_equal(got, want)


REFUSED = [
    ([1., 2.], 0, "seed must be an integer"), ("ab", 0, "seed must be an integer"),
    (1.5, 0, "seed must be an integer"), (None, 0, "seed must be an integer"),
    (np.ones(2), 0, "seed must be an integer"), (torch.ones(2), 0, "seed must be an integer"),
    (np.array([True, False]), 0, "seed must be an integer"),
    ([[1, 2]], 0, "seed must be an integer"), (np.array(1.5), 0, "seed must be an integer"),
    (np.ma.array([1, 2], mask=[0, 1]), 0, "seed must be a plain NumPy array"),
    (b"ab", 0, "seed must be an integer"), ({1, 2}, 0, "seed must be an integer"),
    ([1, 2], 5, "sample must have an id a row"), (0, [1., 2.], "sample must be an integer"),
    ([1, 2], None, "sample must be an integer"), (0, "ab", "sample must be an integer")]


@pytest.mark.parametrize("seed, sample, words", REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_integer_a_row_is_a_type_error(seed, sample, words):
    for call in (lambda: noise.normal((2, 3), seed, sample),
                 lambda: kernels.normal((2, 3), seed=seed, sample=sample),
                 lambda: kernels.update([np.ones((2, 3), "f")], [1.], seed=seed, sample=sample),
                 lambda: samplers.Reference(seed, sample), lambda: Fused(seed, sample)):
        with pytest.raises(TypeError, match=words):
            call()


@pytest.mark.parametrize("seed, sample, words", [
    ([1, 2, 3], 0, r"seed has shape \(3,\), not \(2,\)"), ([], 0, r"seed has shape \(0,\)"),
    (np.ones((2, 1), int), 0, r"seed has shape \(2, 1\)"), (0, [1], r"sample has shape \(1,\)"),
    ([1, 2], [1, 2, 3], r"sample has shape \(3,\)"),
    (torch.ones(1, dtype=int), 0, r"seed has shape \(1,\)")])
def test_there_are_as_many_as_rows(seed, sample, words):
    x = np.ones((2, 3), np.float32)
    for call in (lambda: noise.normal((2, 3), seed, sample),
                 lambda: kernels.update([x], [1., 1.], seed=seed, sample=sample),
                 lambda: kernels.noise_norms(x, seed=seed, sample=sample),
                 lambda: kernels.dsm_loss(x, [1., 1., 1.], seed=seed, sample=sample),
                 lambda: kernels.bind([x], [1., 1.], seed=seed, sample=sample),
                 lambda: samplers.Reference(seed, sample)(sde.perturb, 1, a=1., sigma=1.)(0, x),
                 lambda: Fused(seed, sample)(sde.perturb, 1, a=1., sigma=1.)(0, x)):
        with pytest.raises(ValueError, match=words):
            call()


# ---- the backends, through every way in ----

def test_update_and_normal_on_every_size(place):
    backend, device = place
    for size in SIZES:
        x = torch.randn((6, *size), device=device)
        for seed, sample in ((SEEDS, 0), (SEEDS, IDS), (-2, IDS)):
            z = noise.normal(x.shape, seed, sample, 9, 4)
            draw = {"seed": seed, "sample": sample, "step": 9, "tag": 4, "backend": backend}
            got = kernels.normal(x.shape, device=device, **draw)
            np.testing.assert_array_equal(got.cpu(), z)
            got = kernels.update([x], [.5, 2.], **draw)
            want = np.float32(.5) * x.cpu().numpy() + np.float32(2.) * z
            np.testing.assert_array_equal(got.cpu(), want)


def test_every_way_in_draws_a_rows_own(place):
    """Names, bound calls, sums, the loss and engines: a batch of six and six calls of one."""
    backend, device = place
    x, s = torch.randn((2, 6, 37), device=device)
    kw = {"step": 9, "tag": 4, "backend": backend}
    eps = np.linspace(.1, .6, 6)
    coef = np.linspace(.1, 1., 18).reshape(6, 3)

    def ways(rows, seed, sample):
        u, v = x[rows], s[rows]
        draw = kw | {"seed": seed, "sample": sample}
        out = torch.empty_like(u)
        norms = kernels.noise_norms(u, out=out, **draw)
        engine = Fused(seed, sample, backend)
        corrected = engine.corrector(langevin.langevin_step, solvers.snr_step_size, 16)(
            5, u.clone(), v)
        found = [
            kernels.apply("langevin", u, v, eps=eps[rows], **draw),
            kernels.bind([u], [1., .5], **draw)(9), out, norms,
            kernels.noise_norms(u, **draw), kernels.dsm_loss(v, coef[rows], **draw)[1],
            engine(langevin.langevin_step, 2, eps=np.array([.1, .2]))(1, u, v), corrected]
        return [f.cpu() for f in found]

    together = ways(slice(None), SEEDS, IDS)
    for b in range(6):
        for got, want in zip(together, ways(slice(b, b + 1), SEEDS[b], IDS[b]), strict=True):
            assert torch.equal(got[b:b + 1], want)
    value, _ = kernels.dsm_loss(s, coef, seed=SEEDS, sample=IDS, **kw)
    z = noise.normal(s.shape, SEEDS, IDS, 9, 4)
    e = coef[:, :1].astype("f") * s.cpu().numpy() + coef[:, 1:2].astype("f") * z
    want = (coef[:, 2].astype("f") * (e.astype(float)**2).sum(1)).sum()
    np.testing.assert_allclose(float(value), want, rtol=1e-6)  # its bits: check_sums


def test_sixteen_bits_and_arrays_that_are_not_aligned(place):
    backend, device = place
    for dtype, size, start in (("bfloat16", 1024, 0), ("float16", 33, 0), ("bfloat16", 64, 3),
                               ("float32", 33, 1)):
        kind = getattr(torch, dtype)
        u = torch.randn(6 * size + start, device=device).to(kind)[start:].view(6, size)
        z = torch.from_numpy(noise.normal((6, size), SEEDS, IDS, tag=2))
        want = (np.float32(.5) * u.cpu().float() + np.float32(2.) * z).to(kind)
        got = kernels.update([u], [.5, 2.], seed=SEEDS, sample=IDS, out=u, backend=backend)
        assert torch.equal(got.cpu(), want)


def test_a_step_that_draws_nothing_takes_them_too(place):
    backend, device = place
    x = torch.randn(6, 5, device=device)
    want = kernels.update([x], [.5], backend=backend)
    assert torch.equal(kernels.update([x], [.5], seed=SEEDS, sample=IDS, backend=backend), want)
    with pytest.raises(ValueError, match="seed has shape"):
        kernels.update([x], [.5], seed=SEEDS[:2], backend=backend)


def test_a_counter_and_a_constant_step_add(place):
    """The row is the counter's, the noise is of their sum, mod 2^32."""
    backend, device = place
    x = torch.randn(6, 33, device=device)
    table = np.linspace(.1, 1., 8).reshape(4, 2)
    for seed, sample in ((5, 2), (SEEDS, IDS)):
        for first, k in ((100, 2), (2**32 - 1, 3), (2**31 + 5, 0), (7, 9), (np.uint8(250), 2)):
            row = table[min(k, 3)]
            want = kernels.update([x.cpu()], row, seed=seed, sample=sample,
                                  step=(int(first) + k) % 2**32, backend="numpy")
            for step in (k, torch.tensor(k, device=device)):
                got = kernels.update([x], table, rows="step", step=step, first_step=first,
                                     seed=seed, sample=sample, backend=backend)
                assert torch.equal(got.cpu(), want)
            assert torch.equal(kernels.update([x], row, step=k, first_step=first, seed=seed,
                                              sample=sample, backend=backend).cpu(), want)
            bound = kernels.bind([x], table, rows="step", first_step=first, seed=seed,
                                 sample=sample, backend=backend)
            assert torch.equal(bound(k).cpu(), want)


# ---- engines ----

def test_an_engine_uploads_its_table_once(monkeypatch):
    engine = Fused(SEEDS, IDS, "torch")
    x = torch.randn(6, 5)
    move = engine(langevin.langevin_step, 2, eps=.1)
    first = move(0, x, x)
    monkeypatch.setattr(kernels.launch, "keys", None)  # what makes a table
    assert torch.equal(move(0, x, x), first)
    twin = copy(engine)
    assert torch.equal(twin(langevin.langevin_step, 2, eps=.1)(0, x, x), first)
    with pytest.raises(ValueError, match="seed and sample have 6 rows, not 5"):
        move(0, x[:5], x[:5])


class Named(Fused):
    """One of a user's own, with an argument more."""

    def __init__(self, name, **given):
        super().__init__(**given)
        self.name = name


ENGINES = [
    lambda: Fused(3, 5, "numpy"), lambda: Fused(SEEDS, IDS, "numpy"),
    lambda: Fused(7, IDS, "numpy"),
    lambda: samplers.Reference(3, 5), lambda: samplers.Reference(SEEDS, IDS),
    lambda: samplers.Reference(normal=uncounted),
    lambda: Named("mine", seed=SEEDS, sample=IDS, backend="numpy")]


def uncounted(shape, k, tag):
    return np.full(shape, k, float)


@pytest.mark.parametrize("copied", [copy, deepcopy, lambda engine: loads(dumps(engine))],
                         ids=["copy", "deepcopy", "pickle"])
@pytest.mark.parametrize("make", ENGINES, ids=range(len(ENGINES)))
def test_a_copy_is_another_run_of_the_same_noise(make, copied):
    """It has drawn nothing, also where it was copied in the middle of a run."""
    x = np.ones((6, 5), np.float32)
    run = lambda engine: [*samplers.forward_sde(x, sde.VP(), 4, engine)]
    engine = make()
    want, other = run(engine), copied(engine)
    assert type(other) is type(engine) and getattr(other, "name", "mine") == "mine"
    np.testing.assert_array_equal(run(other), want)
    np.testing.assert_array_equal(run(make()), want)
    if not engine.normal:
        with pytest.raises(ValueError, match="first_step=4"):
            run(other)


@pytest.mark.parametrize("make", [samplers.Reference, Fused])
def test_an_engines_seeds_are_its_own(make):
    """What a caller writes into its array afterwards changes no run."""
    for kind in (np.arange, torch.arange, lambda n: list(range(n))):
        for name, want in (("seed", range(4)), ("sample", [0] * 4)):
            given = kind(4)
            x = np.zeros((4, 3), np.float32)
            move = make(**{name: given})(sde.perturb, 1, a=1., sigma=1.)
            given[0] = 7
            first = move(0, x)
            given[1] = 9
            np.testing.assert_array_equal(move(0, x), first)
            ids = None if name == "seed" else range(4)
            np.testing.assert_array_equal(first, alone((3,), want, ids, tag=1))


def test_bound_seeds_are_copied():
    seeds, x = np.arange(4), np.zeros((4, 3), np.float32)
    for backend in CPU:
        f = kernels.bind([x], [1., 1.], seed=seeds, tag=1, backend=backend)
        seeds[:] = 9
        np.testing.assert_array_equal(f(0), alone((3,), range(4), tag=1))
        seeds[:] = range(4)


# ---- samples follow from their seeds ----

DATA = Mixture([.2, .3, .5], [[-.5] * 5, [.5, -.3, .2, .1, .4], [.1] * 5], .05)


def exact(x, sigma):
    """The mixture's score at a noise level, of arrays or tensors."""
    s = DATA.noised(1, float(sigma)).score(np.asarray(x, float))
    return torch.from_numpy(s.astype(np.float32)) if hasattr(x, "data_ptr") else s


def samples(family, seeds, backend):
    """One sample a seed, of Reference or of Fused on a backend."""
    z = noise.normal((len(seeds), 5), seeds)
    engine = samplers.Reference(seeds)
    if backend:
        z, engine = torch.from_numpy(z), Fused(seeds, backend=backend)
    *_, x = FAMILIES[family](exact, z, 24, engine)
    return dict(zip(seeds, np.asarray(x)))


@pytest.mark.parametrize("backend", [None, *CPU])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_is_its_seeds_alone_in_any_order_in_any_batch(family, backend):
    if family == "pf_ode_adaptive":
        with pytest.raises(ValueError, match="pf_ode_adaptive computes with the whole batch"):
            samples(family, [3, 1], backend)
        return
    three = 3, 1, 2**63 + 4
    want = {seed: samples(family, [seed], backend)[seed] for seed in three}
    batches = [*permutations(three), [7, 3, *range(100, 160), 2**63 + 4, 1]]
    for seeds in batches:
        found = samples(family, list(seeds), backend)
        for seed in three:
            np.testing.assert_array_equal(found[seed], want[seed])
    assert not np.array_equal(want[3], want[1])


@pytest.mark.parametrize("make", [samplers.Reference, Fused])
def test_a_corrector_of_the_whole_batch_refuses_a_seed_a_row(make):
    run = lambda engine, rule: list(samplers.predictor_corrector(
        lambda x, t: -x, np.ones((3, 4), np.float32), sde.VP(), 20, engine, corrector=rule))
    for engine in (make([1, 2, 3]), make(sample=[1, 2, 3])):
        with pytest.raises(ValueError, match="batch_langevin computes with the whole batch"):
            run(engine, "batch_langevin")
    together = run(make([1, 2, 3]), "langevin")[-1]
    np.testing.assert_array_equal(run(make([3, 2, 1]), "langevin")[-1][::-1], together)
    assert run(make(1), "batch_langevin")
