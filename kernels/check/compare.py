"""Two results, compared: element by element, and whole results of any size against
NumPy's."""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import numpy as np
import torch

from ... import noise
from ...machine import cores
from ...noise import PREDICTOR
from .. import dsm_loss, norms, update

CHUNK = 1 << 16  # elements that NumPy computes at once, a core
# Sums are the contract's to an ulp. A loss that is added up from parts may be one more off: each
# is rounded to float32 by 2^-24 of itself, less than an ulp of the whole. The gradient is exact.
ULPS = {"norms": (1,), "noise_norms": (1,), "dsm_loss": (2, 0)}


def ulps(got, expected):
    """Distance in units in the last place of two NumPy arrays, element by element.

    Any NaN equals any NaN; -0 is one away from +0. Bits of a 16-bit float come as int16.
    """
    nan = np.isnan(got) & np.isnan(expected) if got.dtype.kind == "f" else False
    bits = np.dtype(f"i{got.itemsize}")

    def ordered(a):
        i = a.view(bits).astype(np.int64)
        return np.where(i < 0, -(i & np.iinfo(bits).max) - 1, i)
    return np.where(nan, 0, np.abs(ordered(got) - ordered(expected)))


def _numpy(tensor):
    """A tensor's values, or for bfloat16 its bits with every NaN made one."""
    if tensor.dtype == torch.bfloat16:
        nan = tensor.isnan()
        return torch.where(nan, torch.tensor(0x7FC0, dtype=torch.int16),
                           tensor.view(torch.int16)).numpy()
    return tensor.numpy()


def row_of(op, name, dtype, shape, passed, reason, max_ulp=None):
    """One of check's rows."""
    return {"op": op, "backend": name, "dtype": dtype, "shape": shape and list(shape),
            "max_ulp": max_ulp, "passed": passed, "reason": reason}


def compare(op, name, dtype, shape, got, expected, variant="", allowed=0):
    """Compare two CPU tensors to `allowed` ulp; the reason names the worst element."""
    row = partial(row_of, op, name, dtype, shape)
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return row(False, f"returned {got.dtype} {tuple(got.shape)}, not {expected.dtype} "
                          f"{tuple(expected.shape)}")
    d = ulps(_numpy(got.contiguous()), _numpy(expected))
    worst = int(d.max(initial=0))
    if worst <= allowed:
        return row(True, variant, worst)
    at = tuple(int(i) for i in np.unravel_index(d.argmax(), d.shape))
    a, b = float(got[at]), float(expected[at])
    return row(False, f"{variant}: {int((d > 0).sum())} of {d.size} elements differ, most at {at}: "
                      f"got {a:.9g}, expected {b:.9g} (off by {a - b:.3g}, {worst} ulp)", worst)


def in_parts(f, batch, size, chunk=CHUNK):
    """[f(rows)] for slices of rows that make up a batch, on all cores at once.

    NumPy computes without Python's lock.
    """
    rows = max(1, chunk // max(1, size))
    parts = [slice(i, min(i + rows, batch)) for i in range(0, batch, rows)]
    if len(parts) < 2:
        return [f(rows) for rows in parts]
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(f, parts))


def normals_at(rows, quads, seed, sample=0, tag=0):
    """z of these quads of these rows, (rows, 4 quads) float32."""
    rows = np.asarray(rows)[:, None] + sample & noise.MASK
    w = noise.philox((np.asarray(quads), rows, 0, tag), (seed & noise.MASK, seed >> 32))
    return noise.to_normal(np.stack(w, -1)).reshape(len(rows), -1)


@lru_cache(maxsize=2)  # an op's before and after; all ops of a size share them
def normals(shape, *, sample=0, **counter):
    """noise.normal of a large shape, as a tensor that is only to be read."""
    out = torch.empty(shape)

    def part(rows):
        z = noise.normal(out[rows].shape, sample=sample + rows.start, **counter)
        out[rows] = torch.from_numpy(z)
    in_parts(part, len(out), out[:1].numel())
    return out


def oracle(u, coef, like, **counter):
    """The float32 oracle's update of CPU tensors, rounded to like's dtype."""
    out = torch.empty(like.shape)
    update([v.float() for v in u], coef, out=out, backend="numpy", **counter)
    return out.to(like.dtype)


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


def as_tuple(results):
    """One result, or several, as a tuple."""
    return results if isinstance(results, tuple) else (results,)


def same_bits(a, b):
    """Whether two CPU tensors hold the same bits, in the same shape and dtype."""
    if a.dtype != b.dtype:
        return False
    bits = torch.int32 if a.element_size() == 4 else torch.int16
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def require_same(op, name, got, want, when="nothing was timed"):
    """RuntimeError unless all of a result is NumPy's: bit for bit, sums to their ulps."""
    for a, b, ulps in zip(as_tuple(got), as_tuple(want), ULPS.get(op, (0,)), strict=True):
        a = a.detach().cpu()
        if same_bits(a, b):
            continue
        row = compare(op, name, str(b.dtype), b.shape, a, b, "whole", ulps)
        if not row["passed"]:
            raise RuntimeError(f"{op}: {name} does not return the reference's bits at "
                               f"{tuple(b.shape)}; {when} ({row['reason']})")
