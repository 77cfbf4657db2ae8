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
from ..on_numpy import clipped
from .compare import as_float64, comparable, compare, ulps

LEAST = 8  # elements that must differ for a mistake to be named
TRIED = 1 << 15  # elements of a result, at most, that mistakes are tried on
FUSED = ("this is what a fused multiply-add gives: -ffp-contract=off (C), --fmad=false "
         "(CUDA), enable_fp_fusion=False (Triton), XLA_FLAGS=--xla_cpu_max_isa=AVX (JAX on "
         "a CPU), fastmath=False (numba)")
EACH = "the contract rounds each product and each sum to float32, the result to its dtype"
ORDER = "summed in another order: the contract's is ((c0*u0 + c1*u1) + ...) + cz*z"
FLUSHED = ("subnormals flushed to zero: compile without -ftz and -ffast-math; XLA always "
           "flushes on a CPU, --rtol 1e-37 allows that alone")
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
            row["explained"] = "; ".join(explain(case, k, result, draws)) or None
        yield row


def explain(case, k, got, draws):
    """What explains a difference of result k of a case, in words, the likeliest first."""
    whole = far(got, case.expected[k], case.allowed[k])
    if whole.size > TRIED and case.op in OPS:
        case = head(case, TRIED // got[:1].numel() or 1)
        got = got[:len(case.expected[0])]
    expected = case.expected[k]
    off = far(got, expected, case.allowed[k])
    if not off.any():
        return where_it_is_wrong(whole)
    found = of_values(case, got, expected, off)
    if not found and off.size <= TRIED and np.count_nonzero(off) >= LEAST:
        mistakes = of_arguments(case, k, draws)
        if case.op in OPS:
            mistakes = (*of_arithmetic(case), *mistakes)
        found = [words for words, make in mistakes
                 if same(got, make(), expected, case.allowed[k])][:1]
        if not found and draws and case.op in OPS and case.dtype == "float32":
            found = first_stage(case, as_float64(got))
    return found or where_it_is_wrong(whole)


def head(case, rows):
    """A case's first rows."""
    def first(a):
        return a if a is None or np.ndim(a) < 2 else a[:rows]
    counter = case.counter
    if case.keyed:
        counter = counter | {name: counter[name][:rows] for name in ("seed", "sample")}
    return replace(case, shape=(min(rows, case.shape[0]), *case.shape[1:]),
                   u=[u[:rows] for u in case.u], coef=first(case.coef), z=first(case.z),
                   counter=counter)


def same(got, other, expected, allowed):
    """Whether a mistake's result is what was got, and not what was expected."""
    if other is None or other.shape != got.shape:
        return False
    off = far(got, other, allowed)
    other_than_right = far(other, expected, allowed)
    return other_than_right.any() and np.count_nonzero(off) <= off.size // 10_000


def far(a, b, allowed):
    """Where two CPU tensors are more than so many ulp apart."""
    return ulps(comparable(a.contiguous()), comparable(b)) > allowed


# ---- by the values alone ----

def of_values(case, got, expected, off):
    """Zeros, subnormal numbers and NaN that came out otherwise, and nothing else."""
    a = as_float64(got)[off]
    b = as_float64(expected)[off]
    least = torch.finfo(expected.dtype).tiny
    clips = case.op in OPS and OPS[case.op].denoise
    lost = np.isnan(b) & ~np.isnan(a)
    if not a.any() and not b.any():
        return ["the sign of zero: 0 was added, or max and min took one zero for the other"]
    if not a.any() and (abs(b) < least).all():
        return [FLUSHED]
    if lost.all() and clips and same(got, with_fmax(case), expected, 0):
        return ["NaN lost in the clip: fmax and fmin drop it; the contract is "
                "d < lo ? lo : d, then d > hi ? hi : d, which NaN passes"]
    if lost.all():
        return ["NaN lost: NumPy's result is NaN, and 0 * NaN and 0 * inf are too"]
    return []


def where_it_is_wrong(off):
    """Where all the differences lie, if that says something."""
    flat = np.flatnonzero(off)
    first, last = int(flat[0]), int(flat[-1])
    after = off.size - 1 - last
    if len(flat) == 1 and off.size > LEAST:
        return [f"element {first} of {off.size} alone is wrong"]
    if first >= LEAST and len(flat) > .95 * (off.size - first):
        return [f"wrong from element {first} on, right before"]
    if after >= LEAST and len(flat) > .95 * (last + 1):
        return [f"right from element {last + 1} on, wrong before"]
    return []


# ---- other arguments ----

def of_arguments(case, k, draws):
    """(words, what makes the result) of mistakes in what was read."""
    def result(**changed):
        return lambda: replace(case, **changed).expected[k]
    coef = np.asarray(case.coef)
    if coef.ndim == 2 and len(coef) > 1:
        first = np.broadcast_to(coef[:1], coef.shape)
        yield "row 0's coefficients for all", result(coef=first)
        yield "coefficients of the row before", result(coef=np.roll(coef, 1, 0))
    n = len(case.u)
    for order in permutations(range(n)):
        words = "operands, or their coefficients, exchanged"
        yield words, result(u=[case.u[k] for k in order])
        others = range(n, coef.shape[-1])
        yield words, result(coef=coef[..., [*order, *others]])
    if not draws:
        return
    mistakes = of_keys if case.keyed else of_counter
    for words, changed in mistakes(**case.counter):
        yield words, result(counter=case.counter | changed)


def of_counter(seed, sample, step, tag):
    """(words, another counter) of mistakes in a counter."""
    low = noise.MASK
    yield "high word of the seed ignored", {"seed": seed & low}
    yield "low word of the seed ignored", {"seed": seed & ~low}
    yield "the seed's words exchanged", {"seed": (seed & low) << 32 | seed >> 32}
    yield "bit 63 of the seed lost", {"seed": seed & ~(1 << 63)}
    yield "sign of the seed's low word spread into the high one", {
        "seed": noise.signed(seed & low, 32) % 2**64}
    counter = {"seed": seed, "sample": sample, "step": step, "tag": tag}
    for name, value in counter.items():
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
    u, c, clip = columns(case)
    if kind != torch.float32:
        exact = case.exact
        yield "truncated, not rounded to nearest", lambda: towards_zero(exact, kind)
        yield "ties rounded away from zero, not to even", lambda: ties_away(exact, kind)
        yield f"computed in {case.dtype}: {EACH}", lambda: total(u, c, clip, kind)
    yield (f"computed in float64 and rounded at the end: {EACH}",
           lambda: total(u, c, clip, torch.float64).float().to(kind))
    yield FLUSHED, lambda: total(u, c, clip, each=zero_subnormals).to(kind)
    first = "", "this", "first"
    choices = [first] * min(1, len(u) - 1)
    choices += [first[:2]] * (len(u) - 2)
    if clip:
        choices.append(first)
    for fused in product(*choices):
        yield FUSED, lambda f=fused: total(u, c, clip, fused=f).to(kind)
    for order in permutations(range(len(u))):
        yield ORDER, lambda o=order: total(u, c, clip, order=o).to(kind)


def columns(case):
    """(operands and noise, their coefficients, the clip's or None), float32 tensors."""
    u = [t.float() for t in case.terms]
    if OPS[case.op].noise and case.z is None:
        z = noise.normal(case.shape, **case.counter)
        u.append(torch.from_numpy(z))
    coef = torch.tensor(np.asarray(case.coef, np.float32))
    column = -1, *[1] * (len(case.shape) - 1)
    c = [v.view(column) for v in coef.unbind(-1)]
    n = len(u)
    return u, c[:n], c[n:] or None


def with_fmax(case):
    """The update of an op with a clip that drops NaN."""
    kind = getattr(torch, case.dtype)
    clamp = lambda d, lo, hi, _: torch.fmin(torch.fmax(d, lo), hi)
    return total(*columns(case), clamp=clamp).to(kind)


def total(u, c, clip, kind=torch.float32, fused=(), order=None, each=torch.clone,
          clamp=clipped):
    """The update in another precision, order, or with products and sums fused.

    fused: of each sum "this" where its second product is fused into it, "first" where the
    first is; with a clip the last is of d. order: of the terms. each: what is done to every
    number. clamp: how d is clipped.
    """
    def cast(tensors):
        return [each(t.to(kind)) for t in tensors]
    u = cast(u)
    c = cast(c)
    if clip:
        *p, lo, hi = cast(clip)
        d = added(u[:2], p, fused[-1:], each)
        u = [u[0], clamp(d, lo, hi, torch.where), *u[2:]]
        fused = fused[:-1]
    if order:
        u = [u[k] for k in order]
        c = [c[k] for k in order]
    return added(u, c, fused, each)


def added(u, c, fused, each):
    """(c0*u0 + c1*u1) + ..., some products fused into the sum."""
    value = each(c[0] * u[0])
    how = [*fused, *[""] * len(u)]
    for k in range(1, len(u)):
        if how[k - 1] == "this":
            value = noise.fma(c[k], u[k], value, torch)
        elif how[k - 1] == "first":
            value = noise.fma(c[0], u[0], c[1] * u[1], torch)
        else:
            value = each(value + each(c[k] * u[k]))
    return value


def zero_subnormals(t):
    """A tensor with zero, of the same sign, for each number that float32 or its dtype holds
    as subnormal."""
    least = torch.finfo(torch.float32).tiny
    return torch.where(t.abs() < least, t * 0, t)


def towards_zero(exact, kind):
    """float32 cut to a dtype of 16 bits."""
    rounded = exact.to(kind)
    smaller = torch.nextafter(rounded, torch.zeros_like(rounded))
    too_far = rounded.float().abs() > exact.abs()
    return torch.where(too_far, smaller, rounded)


def ties_away(exact, kind):
    """float32 rounded to nearest, and of two as near away from zero."""
    rounded = exact.to(kind)
    away = torch.copysign(torch.full_like(rounded, torch.inf), rounded)
    larger = torch.nextafter(rounded, away)
    above = larger.float() - exact
    below = exact - rounded.float()
    is_tie = above.abs() == below.abs()
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
    known = torch.zeros(1)
    if len(u) > 1:
        known = total(u[:-1], c[:-1], None, torch.float64)
    z = (torch.from_numpy(got) - known) / c[-1].double()
    terms = sum((a * b).abs() for a, b in zip(c, u))
    slack = float((terms / c[-1].abs()).max()) * 2.**-21
    if not bool(torch.isfinite(z).all()) or slack > 1e-2:
        return []
    r, angle = polar(z)
    want_r, want_angle = polar(u[-1].double())
    if not len(r):
        return []
    slack += 1e-3
    turned = angle - want_angle
    on_line = abs(np.sin(turned)) * want_r <= slack
    right_r = mostly(abs(r - want_r) <= slack)
    right_angle = mostly(on_line & (np.cos(turned) > 0))
    exchanged = mostly(abs(np.sin(angle + want_angle) - 1) * want_r <= slack)
    if right_r and right_angle:
        return ["the noise is right to about three digits: radius, cos or sin differ in "
                f"their last bits, as a library's log, cos and sin do; {STAGE}"]
    if right_r and exchanged:
        return [f"the first stage that differs is the pair: cos and sin exchanged; {STAGE}"]
    if right_r and mostly(on_line):
        return [f"the first stage that differs is the radius's sign, bit 31; {STAGE}"]
    if right_r:
        return ["the first stage that differs is cos and sin, the angle; words and radius "
                f"are right; {STAGE}"]
    if right_angle:
        return [f"the first stage that differs is the radius; the angle is right; {STAGE}"]
    return [f"the first stage that differs is the words, Philox and its counter; {STAGE}"]


def mostly(right):
    """Whether nearly all are right."""
    return right.mean() > .99


def polar(z):
    """(radius, angle) of each row's whole pairs of elements."""
    z = z.reshape(len(z), -1).numpy()
    whole = z.shape[1] // 2 * 2
    even = z[:, :whole:2].ravel()
    odd = z[:, 1:whole:2].ravel()
    return np.hypot(even, odd), np.arctan2(odd, even)
