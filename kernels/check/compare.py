"""What is equal to NumPy's result, and how NumPy computes a result of any size.

First the comparisons: `compare` makes a row of one result, `require_same` raises. Then
NumPy's results, whole: of small tensors at once (`oracle`), of large ones in parts, on all
cores (`expected_update`, `expected_sums`).
"""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch

from ... import noise
from ...machine import cores
from ...noise import PREDICTOR
from .. import dsm_loss, norms, update
from ..launch import dtype_name

CHUNK = 1 << 16  # elements that NumPy computes at once, a core
EDGE = 1 << 16  # guard elements either side of an array: more than any kernel's block

# How far each result of large sums may be off, in ulp. The contract allows a sum one. A
# loss that is added up from parts may be one more off: each part is rounded to float32 by
# 2^-24 of itself, which is less than an ulp of the whole. The gradient is exact.
ULPS = {
    "norms": (1,),
    "noise_norms": (1,),
    "dsm_loss": (2, 0),
}


# ---- comparisons ----

class Near(NamedTuple):
    """How far a kernel that is not meant to be equal may be off, by either measure.

    ulp: units in the last place. rtol: |got - expected| <= rtol (1 + |expected|).
    """

    ulp: int = 0
    rtol: float = 0.

    def __str__(self):
        """What is said of a kernel that is as near."""
        bounds = [f"{self.ulp} ulp"] * bool(self.ulp)
        bounds += [f"rtol {self.rtol:g}"] * bool(self.rtol)
        return f"within {' or '.join(bounds)}"


def compare(op, backend, dtype, shape, got, expected, *, part="", allowed=0, near=None):
    """A row that says whether two CPU tensors agree to `allowed` ulp, or are Near.

    op, backend, dtype, shape: what the row says of them. part: what is compared, for the
    row's reason. The reason of a failure also names the worst elements.
    """
    row = partial(row_of, op, backend, dtype, shape)
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return row(False, f"{part}: returned {kind_of(got)}, not {kind_of(expected)}")
    distance = ulps(comparable(got.contiguous()), comparable(expected))
    worst = int(distance.max(initial=0))
    wrong = distance > max(allowed, near.ulp if near else 0)
    apart = differences(got, expected)
    if near and near.rtol:
        wrong &= ~(apart <= near.rtol * (1 + abs(as_float64(expected))))
    if near:  # however near, a number is no infinity, and neither is NaN
        wrong |= got.isnan().numpy() != expected.isnan().numpy()
        wrong |= got.isinf().numpy() != expected.isinf().numpy()
    if not wrong.any():
        return row(True, part, max_ulp=worst, within=near and str(near))
    in_ulp = at_largest(distance)
    largest = at_largest(np.where(np.isfinite(apart), apart, -1.))
    a, b = (float(t[in_ulp]) for t in (got, expected))
    reason = (f"{part}: {np.count_nonzero(wrong)} of {wrong.size} elements differ, most at "
              f"{in_ulp}: got {a:.9g}, expected {b:.9g} (off by {a - b:.3g}, {worst} ulp)")
    if largest != in_ulp and apart[largest] > 0:
        reason += f"; the largest difference is {apart[largest]:.3g}, at {largest}"
    return row(False, reason, max_ulp=worst)


def kind_of(t):
    """A tensor's dtype and shape, in NumPy's words."""
    return f"{dtype_name(t.dtype)} {tuple(t.shape)}"


def as_float64(t):
    """A CPU tensor as a float64 array."""
    return t.double().numpy()


@np.errstate(invalid="ignore")
def differences(got, expected):
    """|got - expected|, element by element, float64; NaN where there is none."""
    return abs(as_float64(got) - as_float64(expected))


def at_largest(a):
    """The index of an array's largest element."""
    index = np.unravel_index(a.argmax(), a.shape)
    return tuple(int(i) for i in index)


def row_of(op, backend, dtype, shape, passed, reason, *, max_ulp=None, within=None,
           explained=None):
    """One of check's rows. within: what a kernel that need not be equal was held to.
    explained: what would make the same difference."""
    return {
        "op": op,
        "backend": backend,
        "dtype": dtype,
        "shape": shape and list(shape),
        "max_ulp": max_ulp,
        "passed": passed,
        "within": within,
        "explained": explained,
        "reason": reason,
    }


def ulps(got, expected):
    """Distance in units in the last place of two NumPy arrays, element by element.

    Any NaN equals any NaN; -0 is one away from +0. Bits of a 16-bit float come as int16.
    """
    both_nan = False
    if got.dtype.kind == "f":
        both_nan = np.isnan(got) & np.isnan(expected)
    distance = np.abs(place(got) - place(expected))
    return np.where(both_nan, 0, distance)


def place(a):
    """Each float's place among all floats of its size, counted from +0, as int64."""
    bits = np.dtype(f"i{a.itemsize}")
    i = a.view(bits).astype(np.int64)
    magnitude = i & np.iinfo(bits).max
    return np.where(i < 0, -magnitude - 1, i)


def comparable(tensor):
    """A tensor's values, or for bfloat16 its bits with every NaN made one."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    nan = torch.tensor(0x7FC0, dtype=torch.int16)
    bits = tensor.view(torch.int16)
    return torch.where(tensor.isnan(), nan, bits).numpy()


def require_same(op, backend, got, want, when="nothing was timed", near=None):
    """RuntimeError unless a result, all of it, is NumPy's: bit for bit, sums to their ulps,
    or Near.

    got, want: a tensor or a tuple of them; want is on the CPU. when: for the message.
    """
    allowed = ULPS.get(op, (0,))
    pairs = zip(as_tuple(got), as_tuple(want), allowed, strict=True)
    for a, b, ulp in pairs:
        a = a.detach().cpu()
        if same_bits(a, b):
            continue
        dtype = str(b.dtype)
        row = compare(op, backend, dtype, b.shape, a, b, part="whole", allowed=ulp,
                      near=near)
        if not row["passed"]:
            raise RuntimeError(f"{op}: {backend} does not return the reference's bits at "
                               f"{tuple(b.shape)}; {when} ({row['reason']})")


def same_bits(a, b):
    """Whether two CPU tensors hold the same bits, in the same shape and dtype."""
    if a.dtype != b.dtype:
        return False
    bits = torch.int32 if a.element_size() == 4 else torch.int16
    a = a.contiguous().view(bits)
    b = b.contiguous().view(bits)
    return torch.equal(a, b)


def as_tuple(results):
    """One result, or several, as a tuple."""
    return results if isinstance(results, tuple) else (results,)


def guarded(values, dtype, device="cpu", shift=0):
    """values as an array of this dtype between two guards, and a call that says whether
    both are whole."""
    start = EDGE + shift
    end = start + values.numel()
    buffer = torch.full((end + EDGE,), 7., dtype=dtype, device=device)
    array = buffer[start:end].view(values.shape).copy_(values)

    def whole():
        guards = torch.cat((buffer[:start], buffer[end:]))
        return bool((guards == 7).all())
    return array, whole


# ---- NumPy's results ----

def oracle(u, coef, like, **counter):
    """The float32 oracle's update of CPU tensors, rounded to like's dtype."""
    u = [v.float() for v in u]
    out = torch.empty(like.shape)
    update(u, coef, out=out, backend="numpy", **counter)
    return out.to(like.dtype)


def expected_update(op, u, coef, like, **counter):
    """NumPy's result of an update, whole, on the CPU. Its noise is one more operand."""
    operands = list(u)
    if op.noise:
        z = normals(tuple(like.shape), **counter)
        operands.append(z)
    out = torch.empty(like.shape)
    coef = np.asarray(coef)

    def part(rows):
        here = [v[rows].cpu().float() for v in operands]
        c = coef[rows] if coef.ndim > 1 else coef
        update(here, c, out=out[rows], backend="numpy")

    in_parts(part, len(out), out[:1].numel())
    return out.to(like.dtype)


def expected_sums(op, s, coef, *, sample=0, **counter):
    """NumPy's norms, noise_norms or dsm_loss of all rows, a tuple of CPU tensors."""
    if op == "dsm_loss":
        return _expected_loss(s, coef, sample, **counter)
    if op == "noise_norms":
        s = normals(tuple(s.shape), sample=sample, **counter)

    def part(rows):
        return norms(s[rows].cpu(), backend="numpy")

    parts = in_parts(part, len(s), s[:1].numel())
    return (torch.cat(parts),)


def _expected_loss(s, coef, sample, **counter):
    """NumPy's dsm_loss of all rows: the value, added up in float64, and the gradient."""
    def part(rows):
        first = sample + rows.start
        here = s[rows].cpu()
        return dsm_loss(here, coef[rows], sample=first, backend="numpy", **counter)

    parts = in_parts(part, len(s), s[:1].numel())
    values, gradients = zip(*parts)
    value = torch.stack(values).double().sum()
    return value.float(), torch.cat(gradients)


@lru_cache(maxsize=2)  # an op's before and after; all ops of a size share them
def normals(shape, *, sample=0, tag=PREDICTOR, **counter):
    """noise.normal of a large shape, as a tensor that is only to be read."""
    out = torch.empty(shape)

    def part(rows):
        here = out[rows]
        first = sample + rows.start
        z = noise.normal(here.shape, sample=first, tag=tag, **counter)
        here.copy_(torch.from_numpy(z))

    in_parts(part, len(out), out[:1].numel())
    return out


def normals_at(rows, quads, seed, sample=0, tag=0):
    """z of these quads of these rows, (rows, 4 quads) float32."""
    samples = np.asarray(rows)[:, None] + sample & noise.MASK
    counter = np.asarray(quads), samples, 0, tag
    key = seed & noise.MASK, seed >> 32
    words = np.stack(noise.philox(counter, key), -1)
    return noise.to_normal(words).reshape(len(samples), -1)


def in_parts(f, batch, size, chunk=CHUNK):
    """[f(rows)] for slices of rows that make up a batch, on all cores at once.

    size: elements of a row. A slice has about `chunk` elements. NumPy computes without
    Python's lock.
    """
    count = max(1, chunk // max(1, size))
    parts = [slice(first, min(first + count, batch))
             for first in range(0, batch, count)]
    if len(parts) < 2:
        return [f(rows) for rows in parts]
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(f, parts))
