"""Whole arrays, bit for bit.

A kernel whose values are right may still write a few elements too far, or leave some
unwritten. `kernels.check.compare.guarded` puts an array into a larger buffer that is full of
sevens, off its alignment if asked; a test fills it with NaN, lets a kernel write, and asks
whether the sevens are still there. `difference` says where two tensors first differ, so that
a failing test names an element. `check` does it all for an update on a backend, against
NumPy's, out of place and in place.
"""

import math

import torch

from minidiff.kernels import update
from minidiff.kernels.check.compare import guarded

FLOATS = "float32", "bfloat16", "float16"


def difference(got, want):
    """Index of the first element whose bits differ, or None. Any NaN equals any NaN."""
    assert got.dtype == want.dtype and got.shape == want.shape
    bits = torch.int32 if want.dtype == torch.float32 else torch.int16
    got = got.cpu()
    nan = got.isnan() & want.isnan()
    unequal = (got.view(bits) != want.view(bits)) & ~nan
    if not unequal.any():
        return None
    return tuple(unequal.nonzero()[0].tolist())


def oracle(operands, coef, dtype, shape, **kw):
    """The float32 result of the NumPy backend on the operands as stored, then rounded."""
    operands = [u.to(dtype).float() for u in operands]
    return update(operands, coef, out=torch.empty(shape), backend="numpy", **kw).to(dtype)


def check(place, dtype, operands, coef, shape, message, shift=0, **kw):
    """Bits and guards: into a poisoned array out of place, then in place onto an operand."""
    backend, device = place
    want = oracle(operands, coef, dtype, shape, **kw)
    for alias in (-1, sum(shape) % len(operands)) if operands else (-1,):
        placed = [guarded(u, dtype, device, shift) for u in operands]
        out = guarded(torch.full(shape, math.nan), dtype, device, shift) \
            if alias < 0 else placed[alias]
        update([u for u, _ in placed], coef, out=out[0], backend=backend, **kw)
        at = difference(out[0], want)
        assert at is None, (f"{message}, dtype {dtype}, shape {shape}, out={alias}: differs first "
                            f"at {at}: {out[0][at]} instead of {want[at]}")
        assert out[1](), f"{message}, dtype {dtype}, shape {shape}, out={alias}: wrote outside"
        for k, (u, whole) in enumerate(placed):
            assert whole() and (k == alias or difference(u, operands[k].to(dtype)) is None), \
                f"{message}, dtype {dtype}, shape {shape}: changed operand {k}"
