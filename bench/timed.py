"""What is timed is what was compared.

Whole results on the timed tensors, before the clock and, with fresh data, after it. And nothing
that did its work is faster than its bytes.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

from .. import noise
from ..kernels import FLOATS, dsm_loss, norms, update
from ..noise import PREDICTOR
from .check import compare
from .clock import clock, summary
from .machine import cores

CHUNK = 1 << 16  # elements that NumPy computes at once, a core
CALLS = 3  # what takes less than so many calls' time is bound by calls, not by bytes
MARGIN = 1.1  # of the fastest rate seen
BITS = dict(zip(FLOATS, (torch.int32, torch.int16, torch.int16)))


def in_parts(f, batch, size):
    """[f(rows)] for slices of rows that make up a batch, on all cores at once.

    NumPy computes without Python's lock.
    """
    rows = max(1, CHUNK // max(1, size))
    parts = [slice(i, min(i + rows, batch)) for i in range(0, batch, rows)]
    if len(parts) < 2:
        return [f(rows) for rows in parts]
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(f, parts))


@lru_cache(maxsize=2)  # an op's before and after; all ops of a size share them
def normals(shape, *, sample=0, **counter):
    """noise.normal of a large shape, as a tensor that is only to be read."""
    out = torch.empty(shape)

    def part(rows):
        z = noise.normal(out[rows].shape, sample=sample + rows.start, **counter)
        out[rows] = torch.from_numpy(z)
    in_parts(part, len(out), out[:1].numel())
    return out


def expected_update(op, u, coef, like, **counter):
    """NumPy's result of an update, whole, on the CPU; its noise is one more operand."""
    out = torch.empty(like.shape)
    z = [normals(tuple(like.shape), **{"tag": PREDICTOR} | counter)] if op.noise else []

    def part(rows):
        operands = [v[rows].cpu().float() for v in u]
        update([*operands, *(v[rows] for v in z)], coef, out=out[rows], backend="numpy")
    in_parts(part, len(out), out[:1].numel())
    return out.to(like.dtype)


def expected_sums(op, s, coef, *, sample=0, **counter):
    """NumPy's norms, noise_norms or dsm_loss of all rows, a tuple of CPU tensors."""
    if op == "noise_norms":
        z = normals(tuple(s.shape), sample=sample, **{"tag": PREDICTOR} | counter)

    def part(rows):
        here = s[rows].cpu()
        draw = counter | {"sample": sample + rows.start, "backend": "numpy"}
        if op == "norms":
            return norms(here, backend="numpy"),
        if op == "noise_norms":
            return norms(z[rows], backend="numpy"),
        value, gradient = dsm_loss(here, coef[rows], **draw)
        return value.double().reshape(1), gradient
    parts = [torch.cat(each) for each in zip(*in_parts(part, len(s), s[:1].numel()))]
    if op == "dsm_loss":
        parts[0] = parts[0].sum().float()
    return tuple(parts)


# Sums are the contract's to an ulp. A loss that is added up from parts may be one more off: each
# is rounded to float32 by 2^-24 of itself, less than an ulp of the whole. The gradient is exact.
ULPS = {"norms": (1,), "noise_norms": (1,), "dsm_loss": (2, 0)}


def require_same(op, name, got, want, when="nothing was timed"):
    """RuntimeError unless all of a result is NumPy's: bit for bit, sums to their ulps."""
    for a, b, ulps in zip(got, want, ULPS.get(op, (0,)), strict=True):
        a, bits = a.detach().cpu(), BITS[str(b.dtype).removeprefix("torch.")]
        alike = a.dtype == b.dtype and a.shape == b.shape
        if alike and torch.equal(a.contiguous().view(bits), b.view(bits)):
            continue
        row = compare(op, name, str(b.dtype), b.shape, a, b, "whole", ulps)
        if not row["passed"]:
            raise RuntimeError(f"{op}: {name} does not return the reference's bits at "
                               f"{tuple(b.shape)}; {when} ({row['reason']})")


AFTER = "what was timed is not what was checked before"


def refresh(tensors, seed):
    """Other random numbers in the same memory."""
    for k, t in enumerate(tensors):
        random = torch.Generator(t.device).manual_seed(seed + k)
        t.copy_(torch.randn(t.shape, device=t.device, generator=random))


def yardsticks(t, arrays):
    """Calls whose times say how fast bytes move.

    They have as many arrays like t as a kernel, so that caches hold them as well or as badly. They
    read and write to another place, or in place, where a CPU need not fetch what it overwrites, or
    only write one. "call" moves nothing.
    """
    held = [torch.zeros_like(t) for _ in range(max(2, arrays))]
    pairs = list(zip(held, held[1:] + held[:1]))  # no copy onto itself, which would be none
    one, end = torch.zeros(2, dtype=t.dtype, device=t.device).split(1)

    def copied():
        for a, b in pairs:
            a.copy_(b)

    def negated():
        for a in held[:arrays]:
            a.neg_()

    def added():
        for a, b in pairs:
            a.add_(b)
    return {"copied": copied, "negated": negated, "added": added,
            "filled": lambda: held[0].fill_(1.), "zeroed": held[0].zero_,
            "call": lambda: end.copy_(one)}


def times_of(functions, device, seconds):
    """{name: median and quartiles} of one interleaved run."""
    return {name: summary(t) for name, t in clock(functions, device, seconds).items()}


def require_possible(op, name, time, moved, only_writes, size, arrays, times):
    """RuntimeError for what moves its bytes faster than anything moves that many.

    MARGIN over the fastest yardstick, quartile against quartile, apart from the time that the calls
    take; nothing is said of sizes where they take most of it.
    """
    pairs = max(2, arrays)
    passes = {"filled": 1, "zeroed": 1} if only_writes else {
        "copied": 2 * pairs, "negated": 2 * arrays, "added": 3 * pairs}
    calls = {"negated": arrays, "copied": pairs, "added": pairs, "filled": 1, "zeroed": 1}
    took = {n: times[n]["quartiles"][0] - calls[n] * times["call"]["quartiles"][1] for n in passes}
    if any(took[n] < CALLS * calls[n] * times["call"]["seconds"] for n in passes):
        return
    fastest = max(passes[n] * size / took[n] for n in passes)
    ratio = moved / time["quartiles"][1] / fastest
    if ratio > MARGIN:
        raise RuntimeError(f"{op}: {name} moves its bytes at {ratio:.1f} times the rate of "
                           f"{'writing' if only_writes else 'copying'} as many, and so has not "
                           "moved them; its time is not reported")
