"""What would make the same difference: a failed row says what to look for.

`compared` makes a case's rows. Where a result differs, `explain` computes what known
mistakes give in the same case, and names the one that gives what was got, bit for bit.
Where a function draws its own noise, `first_stage` says how far its noise is right.
"""

from dataclasses import replace
from itertools import permutations, product

import numpy as np
import torch

from ... import noise
from .. import OPS
from .compare import as_float64, comparable, compare, ulps

TRIED = 1 << 15  # elements of a result, at most, that mistakes are tried on
FUSED = ("this is what a fused multiply-add gives: -ffp-contract=off (C), --fmad=false "
         "(CUDA), enable_fp_fusion=False (Triton), XLA_FLAGS=--xla_cpu_max_isa=AVX (JAX on "
         "a CPU), fastmath=False (numba)")
STAGE = "compare with check --stages"


def compared(case, backend, got, *, where="", near=None, draws=False):
    """A row for each of a case's results, CPU tensors that a backend got.

    where: added to a row's reason. near: what the results are held to, if not to the bits.
    draws: whether the noise was drawn by what is checked.
    """
    results = zip(got, case.expected, case.parts, case.allowed)
    for k, (result, expected, part, ulp) in enumerate(results):
        row = compare(case.op, backend, case.dtype, case.shape, result, expected,
                      part=part + where, allowed=ulp, near=near)
        if row["max_ulp"] is not None and not row["passed"]:
            row["explained"] = "; ".join(explain(case, k, result, draws))
        yield row


def explain(case, k, got, draws):
    """What explains a difference of result k of a case, in words, the likeliest first."""
    expected = case.expected[k]
    off = ulps(comparable(got.contiguous()), comparable(expected)) > case.allowed[k]
    found = of_values(case, got, expected, off)
    if not found and off.size <= TRIED:
        mistakes = of_arguments(case, k, draws)
        if case.op in OPS:
            mistakes = (*of_arithmetic(case), *mistakes)
        found = [words for words, make in mistakes
                 if same(got, make(), expected, case.allowed[k])][:1]
    if not found and off.size <= TRIED and draws and case.op in OPS and case.dtype == "float32":
        found = first_stage(case, as_float64(got))
    return found or where_it_is_wrong(off)


def same(got, other, expected, allowed):
    """Whether a mistake's result is what was got, and not what was expected."""
    if other is None or other.shape != got.shape:
        return False
    distance = ulps(comparable(got.contiguous()), comparable(other))
    wrong = ulps(comparable(other), comparable(expected)) > allowed
    return wrong.any() and np.count_nonzero(distance > allowed) <= distance.size // 10_000


# ---- by the values alone ----

def of_values(case, got, expected, off):
    """Zeros, subnormal numbers and NaN that came out otherwise, and nothing else."""
    a, b = (as_float64(t)[off] for t in (got, expected))
    least = torch.finfo(expected.dtype).tiny
    clips = case.op in OPS and OPS[case.op].denoise
    if ((a == 0) & (b == 0)).all():
        return ["the sign of zero: 0 was added, or max and min took one zero for the other"]
    if ((a == 0) & (abs(b) < least)).all():
        return [FLUSHED]
    if (np.isnan(b) & ~np.isnan(a)).all() and clips:
        return ["NaN lost in the clip: fmax and fmin drop it; the contract is d < lo ? lo : "
                "d, then d > hi ? hi : d, which NaN passes"]
    if (np.isnan(b) & ~np.isnan(a)).all():
        return ["NaN lost: NumPy's result is NaN, and 0 * NaN and 0 * inf are too"]
    return []


FLUSHED = "subnormals flushed to zero: compile without -ftz and -ffast-math"


def where_it_is_wrong(off):
    """Where all the differences lie, if that says something."""
    flat = np.flatnonzero(off)
    first, last = int(flat[0]), int(flat[-1])
    if len(flat) == 1 < off.size:
        return [f"element {first} of {off.size} alone is wrong"]
    if first and len(flat) > (off.size - first) // 2:
        return [f"wrong from element {first} on, right before"]
    if last < off.size - 1 and len(flat) > (last + 1) // 2:
        return [f"right from element {last + 1} on, wrong before"]
    return []


# ---- other arguments ----

def of_arguments(case, k, draws):
    """(words, what makes the result) of mistakes in what was read."""
    def result(**changed):
        return lambda: replace(case, **changed).expected[k]
    coef = np.asarray(case.coef)
    if coef.ndim == 2 and len(coef) > 1:
        yield "row 0's coefficients for all", result(coef=np.broadcast_to(coef[:1], coef.shape))
        yield "coefficients of the row before", result(coef=np.roll(coef, 1, 0))
    if case.op in OPS:
        flushed = [zero_subnormals(u) for u in case.u]
        z = None if case.z is None else zero_subnormals(case.z)
        inputs = replace(case, u=flushed, z=z, coef=zero_subnormals(torch.tensor(coef)).numpy())
        yield FLUSHED, lambda: zero_subnormals(inputs.expected[k])
    if not draws:
        return
    mistakes = of_keys if case.keyed else of_counter
    for words, changed in mistakes(**case.counter):
        yield words, result(counter=case.counter | changed)


def zero_subnormals(t):
    """A tensor with zero, of the same sign, for each number that float32 or its dtype holds
    as subnormal."""
    return torch.where(t.abs() < torch.finfo(torch.float32).tiny, t * 0, t)


def of_counter(seed, sample, step, tag):
    """(words, another counter) of mistakes in a counter."""
    low = noise.MASK
    yield "high word of the seed ignored", {"seed": seed & low}
    yield "low word of the seed ignored", {"seed": seed & ~low}
    yield "the seed's words exchanged", {"seed": (seed & low) << 32 | seed >> 32}
    yield "bit 63 of the seed lost", {"seed": seed & ~(1 << 63)}
    yield "sign of the seed's low word spread into the high one", {
        "seed": noise.signed(seed & low, 32) % 2**64}
    for name, value in {"seed": seed, "sample": sample, "step": step, "tag": tag}.items():
        yield f"{name} ignored", {name: 0}
        yield f"bit 31 of {name} lost", {name: value & ~(1 << 31)}
    yield "step off by one", {"step": step + 1}
    yield "step off by one", {"step": step - 1}
    yield "step and tag exchanged", {"step": tag, "tag": step}
    yield "sample off by one", {"sample": sample + 1}


def of_keys(seed, sample, **_):
    """(words, another counter) of mistakes in a seed and an id a row."""
    low = noise.MASK
    yield "high word of the seed ignored", {"seed": seed & low}
    yield "row 0's seed for all", {"seed": seed * 0 + seed[:1]}
    yield "row 0's id for all", {"sample": sample * 0 + sample[:1]}
    yield "ids ignored", {"sample": sample * 0}
    yield "ids ignored, rows counted", {"sample": np.arange(len(sample))}


# ---- another arithmetic ----

def of_arithmetic(case):
    """(words, what makes the result) of updates that round otherwise."""
    kind = getattr(torch, case.dtype)
    op = OPS[case.op]
    u, c, clip = columns(case)
    if kind != torch.float32:
        exact = case.exact
        yield "truncated, not rounded to nearest", lambda: towards_zero(exact, kind)
        yield "ties rounded away from zero, not to even", lambda: ties_away(exact, kind)
        yield (f"computed in {case.dtype}: the contract computes in float32 and rounds once",
               lambda: total(u, c, clip, kind))
    yield ("computed in float64 and rounded at the end: the contract rounds each product and "
           "sum in float32", lambda: total(u, c, clip, torch.float64).float().to(kind))
    choices = [["", "this", "first"], *[["", "this"]] * (len(u) - 2)][:len(u) - 1]
    for fused in product(*choices, *choices[:1] * bool(op.denoise)):
        yield FUSED, lambda f=fused: total(u, c, clip, fused=f).to(kind)
    for order in permutations(range(len(u))):
        yield ("summed in another order: the contract's is ((c0*u0 + c1*u1) + ...) + cz*z",
               lambda o=order: total(u, c, clip, order=o).to(kind))


def columns(case):
    """(operands and noise, their coefficients, the clip's or None), float32 tensors."""
    u = [t.float() for t in case.terms]
    if OPS[case.op].noise and case.z is None:
        z = noise.normal(case.shape, **case.counter)
        u.append(torch.from_numpy(z))
    coef = torch.tensor(np.asarray(case.coef, np.float32))
    c = [v.view(-1, *[1] * (len(case.shape) - 1)) for v in coef.unbind(-1)]
    return u, c[:len(u)], c[len(u):] or None


def total(u, c, clip, kind=torch.float32, fused=(), order=None):
    """The update in another precision, order, or with products and sums fused.

    fused: of each sum "this" where its second product is fused into it, "first" where the
    first is; with a clip the last is of d. order: of the terms.
    """
    u, c = ([t.to(kind) for t in ts] for ts in (u, c))
    if clip:
        p0, p1, lo, hi = (t.to(kind) for t in clip)
        d = added(u[:2], [p0, p1], fused[-1:])
        d = torch.where(d < lo, lo, d)
        d = torch.where(d > hi, hi, d)
        u = [u[0], d, *u[2:]]
        fused = fused[:-1]
    if order:
        u, c = ([ts[k] for k in order] for ts in (u, c))
    return added(u, c, fused)


def added(u, c, fused):
    """(c0*u0 + c1*u1) + ..., some products fused into the sum."""
    value = c[0] * u[0]
    how = [*fused, *[""] * len(u)]
    for k in range(1, len(u)):
        if how[k - 1] == "this":
            value = noise.fma(c[k], u[k], value, torch)
        elif how[k - 1] == "first":
            value = noise.fma(c[0], u[0], c[1] * u[1], torch)
        else:
            value = value + c[k] * u[k]
    return value


def towards_zero(exact, kind):
    """float32 cut to a dtype of 16 bits."""
    rounded = exact.to(kind)
    smaller = torch.nextafter(rounded, torch.zeros_like(rounded))
    return torch.where(rounded.float().abs() > exact.abs(), smaller, rounded)


def ties_away(exact, kind):
    """float32 rounded to nearest, and of two as near away from zero."""
    rounded = exact.to(kind)
    larger = torch.nextafter(rounded, torch.sign(exact).to(kind) * torch.inf)
    is_tie = (larger.float() - exact).abs() == (exact - rounded.float()).abs()
    return torch.where(is_tie, larger, rounded)


# ---- the noise ----

def first_stage(case, got):
    """How far the noise that a float32 update was made with is right: the first stage of
    the contract that differs.

    z is solved for in float64, to the rounding of the update over its coefficient; what is
    not off by more says nothing.
    """
    u, c, clip = columns(case)
    if clip or not bool((c[-1] != 0).all()):
        return []
    known = total(u[:-1], c[:-1], None, torch.float64) if len(u) > 1 else torch.zeros(1)
    z = (torch.from_numpy(got) - known) / c[-1].double()
    size = sum((a * b).abs() for a, b in zip(c, u)) / c[-1].abs()
    slack = float(size.max()) * 2.**-21
    if not bool(torch.isfinite(z).all()) or slack > 1e-2:
        return []
    (r, angle), (want_r, want_angle) = (polar(t) for t in (z, u[-1].double()))
    if not len(r):
        return []
    turned = np.sin(angle - want_angle), np.cos(angle - want_angle)
    right_r = mostly(abs(r - want_r) <= slack + 1e-3)
    right_angle = mostly((abs(turned[0]) * want_r <= slack + 1e-3) & (turned[1] > 0))
    exchanged = mostly(abs(np.sin(angle + want_angle) - 1) * want_r <= slack + 1e-3)
    if right_r and right_angle:
        return ["the noise is right to about three digits: radius, cos or sin differ in their "
                f"last bits, as a library's log, cos and sin do; {STAGE}"]
    if right_r and exchanged:
        return [f"the first stage that differs is the pair: cos and sin exchanged; {STAGE}"]
    if right_r and mostly(abs(turned[0]) * want_r <= slack + 1e-3):
        return [f"the first stage that differs is the radius's sign, bit 31; {STAGE}"]
    if right_r:
        return ["the first stage that differs is cos and sin, the angle; words and radius are "
                f"right; {STAGE}"]
    if right_angle:
        return [f"the first stage that differs is the radius; the angle is right; {STAGE}"]
    return [f"the first stage that differs is the words, Philox and its counter; {STAGE}"]


def mostly(right):
    """Whether nearly all are right."""
    return right.mean() > .99


def polar(z):
    """(radius, angle) of each row's whole pairs of elements."""
    z = z.expand(z.shape).reshape(len(z), -1).numpy()
    whole = z.shape[1] // 2 * 2
    even, odd = z[:, :whole:2].ravel(), z[:, 1:whole:2].ravel()
    return np.hypot(even, odd), np.arctan2(odd, even)
