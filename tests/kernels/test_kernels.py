"""Every backend returns the oracle's bits, and the oracle the equation's value."""

import math
from inspect import signature

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exact import FLOATS, check, difference, oracle
from minidiff import ddpm, kernels, langevin, noise, sde
from minidiff.kernels import OPS, Op, coefficients, update
from minidiff.kernels.check.compare import guarded

COUNTER = {"seed": 0x123456789ABCDEF, "sample": 2**32 - 3, "step": 5, "tag": 2}
SHAPES = [(5, d) for d in range(1, 10)] + [
    (0,), (0, 3), (4, 0), (1,), (1, 1), (7,), (13, 101), (2, 3, 1, 5, 7), (8, 64), (9, 2, 12),
    (300, 2), (3, 4099)]
SPECIAL = [math.nan, math.inf, -math.inf, -0., 0., 1e-40, -1e-45, 6e-8, 3e38, -65504., 1., .1]


# ---- every op ----

def drawn(op, rng, batch=None):
    """Random parameters of a row, its clip bounds if it has any, and its coefficients."""
    parameters, ends = op.parameters(rng, batch), (-.5, .8) if op.denoise else None
    return parameters, ends, op.coefficients(ends, **parameters)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_op_on_every_shape(place, dtype):
    """Per call and per sample. Triton, whose compiler has a kernel for each shape, and what is
    interpreted here take every ninth shape an op, so that all shapes come in turn."""
    stride = 9 if place[0] == "triton" or place == ("cupy", "cpu") else 1
    rng = np.random.default_rng(0)
    for n, (op, per_sample) in enumerate((op, p) for op in OPS.values() for p in (False, True)):
        for shape in SHAPES[n % stride::stride]:
            operands = [torch.from_numpy(rng.standard_normal(shape, np.float32))
                        for _ in op.operands]
            *_, coef = drawn(op, rng, shape[0] if per_sample else None)
            check(place, getattr(torch, dtype), operands, coef, shape,
                  f"{op.name}, per sample {per_sample}", shift=n % 2, **COUNTER)


def test_apply_is_update_with_the_rows_coefficients(place):
    backend, device = place
    for op in OPS.values():
        rng = np.random.default_rng(1)
        operands = [torch.from_numpy(rng.standard_normal((3, 7), np.float32)).to(device)
                    for _ in op.operands]
        parameters, ends, coef = drawn(op, rng, 3)
        want = oracle([u.cpu() for u in operands], coef, torch.float32, (3, 7), **COUNTER)
        for name in (op.name, op) if op.denoise else (op.name, op, op.step):
            got = kernels.apply(name, *operands, clip=ends, **parameters, **COUNTER,
                                backend=backend, out=torch.empty((3, 7), device=device))
            assert difference(got, want) is None, op.name


def own(f, parameters):
    return {name: v for name, v in parameters.items() if name in signature(f).parameters}


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_rows_are_their_equation(op):
    """At random inputs the step in float64 is the sum of its coefficients' products to 1e-12,
    0 at 0, and the float32 update of n terms lies within gamma_{n+1} sum |c u| of it.

    A term meets the rounding of its coefficient, of its product and of at most n - 1 sums:
    n + 1 factors 1 + d, |d| <= e = 2^-24, so gamma_m = m e / (1 - m e) [Higham, lemma 3.1].
    A denoised operand comes with its own such error, which the clip does not enlarge.
    Beneath 2^-126 a rounding may lose 2^-150 instead: 2^-140 covers all.
    """
    def gamma(terms):
        m = (len(terms) + 1) * 2.**-24
        return m / (1 - m) * sum(map(np.abs, terms))

    rng, shape = np.random.default_rng(2), (16, 5)
    for _ in range(50):
        p, ends, coef = drawn(op, rng)
        c, clip = (coef[:-4], coef[-4:]) if op.denoise else (coef, None)
        u = [rng.standard_normal(shape, np.float32) for _ in op.operands]
        got = update(u, coef, out=np.empty(shape, np.float32), backend="numpy", **COUNTER)
        u = [v.astype(np.float64) for v in u + [noise.normal(shape, **COUNTER)] * op.noise]
        slack = 2.**-140
        if op.denoise:
            pair = [clip[0] * u[0], clip[1] * u[1]]
            denoised = op.denoise(u[0], u[1], **own(op.denoise, p))
            assert np.allclose(denoised, sum(pair), rtol=0, atol=1e-12 * np.abs(pair).max())
            u[1] = np.clip(denoised, *ends)
            slack += 1.01 * abs(c[1]) * gamma(pair)
        terms = [c_k * u_k for c_k, u_k in zip(c, u, strict=True)]
        exact = op.step(*u, **own(op.step, p))
        size = np.maximum(sum(map(np.abs, terms)), 1)
        assert (np.abs(exact - sum(terms)) <= 1e-12 * size).all()
        assert np.all(op.step(*(0. * v for v in u), **own(op.step, p)) == 0)
        assert (np.abs(got - exact) <= gamma(terms) + slack).all()


def test_rows_move_gaussians_as_they_should():
    """The variance after one step, from the coefficients alone, where a Gaussian's is known:
    exactly, or for an Euler step of dt to O(dt^2), 1 % of the change at dt = 1e-4."""
    def after(step, v, s=0., **p):
        op, c = Op(step.__name__, step), coefficients(step, **p)
        cx = c[0] + c[1] * s if "s" in op.operands else c[0]
        return cx**2 * v + c[-1]**2 * op.noise

    eps, beta, a, b, eta = .01, .02, .3, .6, .7  # a, b: alpha_bar and the one before
    assert math.isclose(after(sde.perturb, 2., a=.6, sigma=3.), .36 * 2 + 9)
    assert math.isclose(after(langevin.langevin_step, 2., -1 / 2, eps=eps), 2 + eps**2 / 8)
    assert math.isclose(after(ddpm.forward_step, 3., beta=beta), 1 + (1 - beta) * 2)
    assert math.isclose(after(ddpm.ancestral_step, 1., -1., beta=beta, variance=beta), 1)
    assert math.isclose(after(ddpm.ddim_step, 1 - a, -1 / (1 - a), alpha_bar=a,
                              alpha_bar_prev=b, eta=eta), 1 - b)
    assert math.isclose(after(ddpm.posterior_step, 1 - a, alpha_bar=a, alpha_bar_prev=b,
                              variance=(1 - b) / (1 - a) * (1 - a / b)), 1 - b)
    dt, t, v0 = 1e-4, .4, 2.
    for model in (sde.VE(), sde.VP(), sde.SubVP(), sde.FlowMatching()):
        def variance(t, model=model):
            scale, sigma = model.marginal(t)
            return scale**2 * v0 + sigma**2

        v, p = variance(t), {"sde": model, "t": t, "dt": dt}
        up, down = variance(t + dt), variance(t - dt)
        n = round(1 / dt) + 1
        for got, want in (
                (after(sde.forward_sde_step, v, **p), up),
                (after(sde.reverse_sde_step, v, -1 / v, **p), down),
                (after(sde.pf_ode_step, v, -1 / v, **p), down),
                (after(sde.reverse_diffusion_step, v, -1 / v, sde=model, i=round(t / dt), n=n),
                 down)):
            assert abs(got - want) < .01 * abs(want - v)


# ---- the update itself ----

@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", FLOATS)
def test_up_to_four_operands_noise_and_clip(place, dtype):
    """With NaN, infinities, -0, subnormals and the largest values among the operands; plain and
    clipped, per call and per sample. Bounds are finite, on one side, or none in effect: per call
    in turn, per sample each in two rows."""
    rng = np.random.default_rng(3)
    bounds = [.9, -.4, -1., 1.], [1., 0., 0., math.inf], [.5, 2., -math.inf, math.inf]
    for count, draws in ((c, d) for c in range(5) for d in (False, True) if c or d):
        shape = (6, 40) if draws else (6, 37)
        for clipped in (False, True) if count > 1 else (False,):
            for per_sample in (False, True):
                operands = [torch.from_numpy(rng.standard_normal(shape, np.float32))
                            for _ in range(count)]
                for u in operands:
                    u.view(-1)[rng.integers(0, u.numel(), 30)] = torch.tensor(
                        rng.choice(SPECIAL, 30), dtype=torch.float32)
                coef = rng.standard_normal((6, count + draws))
                if clipped:
                    rows = np.roll(bounds, count + draws, axis=0).repeat(2, 0)
                    coef = np.concatenate((coef, rows), 1)
                check(place, getattr(torch, dtype), operands, coef if per_sample else coef[0],
                      shape, f"{count} operands, draws {draws}, clipped {clipped}, "
                      f"per sample {per_sample}", **COUNTER)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_pattern_loads_and_stores(place, dtype):
    """coef [1] is the identity: -0, subnormals and infinities included."""
    x = torch.arange(-2**15, 2**15).short().view(getattr(torch, dtype)).view(64, 1024)
    got = update([x.to(place[1])], [1.], backend=place[0])
    assert difference(got, x) is None


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stores_round_to_nearest_even(place, dtype):
    """float32 values that are 16-bit ones, ties between two, and their neighbours; and any.

    A coefficient a sample on an operand of ones makes the float32 result any we like.
    """
    kind = getattr(torch, dtype)
    low = torch.arange(-2**15, 2**15).short().view(kind).float().view(torch.int32)
    half = 1 << 15 if dtype == "bfloat16" else 1 << 12  # half a unit in float16's last place
    i = torch.cat([low, low + half, low + half - 1, low + half + 1, low + 1, low - 1])
    i = torch.cat([i, torch.from_numpy(np.random.default_rng(4).integers(
        -2**31, 2**31, 1 << 16, np.int32))])
    values = torch.cat([i.view(torch.float32), torch.tensor(
        [2.**-25, 2.**-24 * 1.5, 2.**-24 * 2.5, 65519.99, 65520., -65520., 3.4e38])])
    if dtype == "float16":  # ties between its subnormals
        values = torch.cat([values, (torch.arange(-2047, 2048, 2) * 2.**-25)])
    got = update([torch.ones(len(values), 1, dtype=kind, device=place[1])], values[:, None],
                 backend=place[0])
    assert difference(got[:, 0], values.to(kind)) is None
    if dtype == "float16":
        exact = torch.from_numpy(values.numpy().astype(np.float16))
        assert difference(values.to(kind), exact) is None


@pytest.mark.parametrize("dtype", FLOATS)
def test_batch_splits_and_storage_offsets_change_nothing(place, dtype):
    """A batch in parts, each with its first sample's id; parts start at any address."""
    backend, device = place
    kind, rng = getattr(torch, dtype), np.random.default_rng(5)
    for size in (7, 8):
        x, s = (torch.from_numpy(rng.standard_normal((11, size), np.float32)).to(kind)
                for _ in range(2))
        coef = rng.standard_normal((11, 3))
        want = oracle([x, s], coef, kind, (11, size), **COUNTER)
        for shift in (0, 1, 2, 3):
            (x_, _), (s_, _) = guarded(x, kind, device, shift), guarded(s, kind, device)
            for a, b in ((0, 4), (4, 5), (5, 11)):
                got = update([x_[a:b], s_[a:b]], coef[a:b], backend=backend,
                             **COUNTER | {"sample": COUNTER["sample"] + a})
                assert difference(got, want[a:b]) is None, (size, shift, a, b)


def test_strided_operands_are_copied(place):
    backend, device = place
    x = torch.from_numpy(np.random.default_rng(6).standard_normal((6, 10), np.float32))
    views = [x.to(device)[::2, ::3], x.to(device).T[:3, :4].T[:3, :3],
             x.to(device)[:3, :1].expand(3, 4)]
    for u in views:
        assert not u.is_contiguous()
        want = oracle([u.cpu()], [2., 1.], torch.float32, tuple(u.shape))
        assert difference(update([u], [2., 1.], backend=backend), want) is None


def test_any_seed_sample_step_and_tag(place):
    """Seeds beyond 2^32 and negative; sample ids that pass 2^31 and wrap at 2^32, as steps and
    tags do."""
    backend, device = place
    for seed in (0, 2**31, 2**32, 2**63, 2**64 - 1, -1, -2**40):
        for first in (0, 2**31 - 2, 2**32 - 2, 2**33 + 1, 2**64 + 5, -1):
            counter = {"seed": seed, "sample": first, "step": seed + first, "tag": first}
            got = kernels.normal((4, 5), device=device, backend=backend, **counter)
            want = torch.from_numpy(noise.normal((4, 5), **counter))
            assert difference(got, want) is None, counter


def test_integers_may_be_numpys(place):
    backend, device = place
    counter = {"seed": 3, "sample": 4, "step": 5, "tag": 6}
    want = torch.from_numpy(noise.normal((2, 3), **counter))
    for kind in (np.int32, np.int64, np.uint32):
        got = kernels.normal((2, 3), device=device, backend=backend,
                             **{name: kind(v) for name, v in counter.items()})
        assert difference(got, want) is None, kind


def test_a_step_counter_selects_the_row_and_is_the_noises_step(place):
    """The row is clamped to the last, the noise's step is not; nothing writes the counter."""
    backend, device = place
    rng = np.random.default_rng(7)
    u = [torch.from_numpy(rng.standard_normal((3, 6), np.float32)) for _ in range(2)]
    clipped = rng.standard_normal((4, 7))
    for k in (-1, 0, 1, 3, 4, 9, 2**32 + 1, 2**64 - 1, 2**70 + 2, -2**66 - 5):
        for table in (clipped[:, :3], clipped):
            want = oracle(u, table[max(0, min(k, 3))], torch.float32, (3, 6), step=k, seed=8)
            fits = -2**63 <= k < 2**63
            step = torch.tensor(k, device=device) if fits else None
            for how in (step, k)[not fits:]:  # a number chooses as a counter does
                got = update([v.to(device) for v in u], table, step=how, rows="step", seed=8,
                             backend=backend)
                assert difference(got, want) is None, (k, table.shape)
                assert step is None or step == k


def test_rows_a_sample_beside_a_step_counter(place):
    """The rows are the samples', the counter is the noise's step alone."""
    backend, device = place
    u, rows = torch.ones(5, 6, device=device), np.random.default_rng(7).standard_normal((5, 2))
    got = update([u], rows, step=torch.tensor(3, device=device), rows="sample", backend=backend)
    assert difference(got, oracle([u.cpu()], rows, torch.float32, (5, 6), step=3)) is None


def test_a_step_counter_never_changes_what_parameters_mean(place):
    """One a sample is one a sample, whether the step is a number or a counter, of tensors or of
    arrays; where rows could be either it must be said."""
    backend, device = place
    x, s = torch.zeros(4, 3, device=device), torch.ones(4, 3, device=device)
    eps, rows = np.array([1., 2., 3., 4.]), np.random.default_rng(7).standard_normal((4, 3))
    for k in (0, 2, 9):
        want = kernels.apply("langevin", x, s, eps=eps, step=k, backend=backend)
        counter = torch.tensor(k, device=device)
        got = kernels.apply("langevin", x, s, eps=eps, step=counter, backend=backend)
        assert torch.equal(got, want)
        for f in (kernels.update, kernels.bind):
            with pytest.raises(ValueError, match='counter: say rows="step".*rows="sample"'):
                f([x, s], rows, step=counter, backend=backend)
        assert torch.equal(kernels.bind([x, s], rows, step=counter, rows="sample",
                                        backend=backend)(counter),
                           kernels.update([x, s], rows, step=k, backend=backend))
    with pytest.raises(ValueError, match="rows must be 'sample' or 'step', got 'steps'"):
        kernels.update([x, s], rows, rows="steps", backend=backend)
    if device == "cpu" and backend != "triton":
        a, b = (kernels.apply("langevin", x.numpy(), s.numpy(), eps=eps, step=step,
                              backend="host") for step in (2, np.array(2)))
        assert np.array_equal(a, b)


def test_a_step_counter_in_numpy():
    x, table = np.ones((2, 3), np.float32), [[1., 2.], [3., 4.]]
    for name in ("numpy", "host"):
        if kernels.why_not(name) is None:
            for k in range(4):
                got = update([x], table, step=np.array(k), rows="step", backend=name)
                want = update([x], table[min(k, 1)], step=k, backend="numpy")
                assert np.array_equal(got.view(np.uint32), want.view(np.uint32))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_host_is_numpy_whatever_is_drawn(data):
    reason = kernels.why_not("host")
    if reason:
        pytest.skip(f"host: {reason}")
    integers = st.integers
    shape = tuple(data.draw(st.lists(integers(0, 40), min_size=1, max_size=4)))
    shape = shape if math.prod(shape) < 1 << 16 else shape[:2]
    count, dtype = data.draw(integers(0, 4)), data.draw(st.sampled_from(FLOATS))
    draws = data.draw(st.booleans()) or not count
    per_sample = data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(integers(0, 2**32)))
    operands = [torch.from_numpy(rng.standard_normal(shape, np.float32)
                                 * np.float32(10.)**rng.integers(-45, 38)) for _ in range(count)]
    rows = shape[0] if per_sample else 1
    coef = rng.standard_normal((rows, count + draws))
    if count > 1 and data.draw(st.booleans()):
        coef = np.concatenate((coef, np.sort(rng.standard_normal((rows, 4)), 1)), 1)
    check(("host", "cpu"), getattr(torch, dtype), operands, coef if per_sample else coef[0], shape,
          "hypothesis", shift=data.draw(integers(0, 3)),
          seed=data.draw(integers(-2**63, 2**64 - 1)), sample=data.draw(integers(0, 2**40)),
          step=data.draw(integers(0, 2**40)), tag=data.draw(integers(0, 2**32 - 1)))
