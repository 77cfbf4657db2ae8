"""Whole arrays, bit for bit, and what lies around them.

A kernel that is right may still write a few elements too far, or leave some unwritten. `guarded`
puts an array into a larger buffer that is full of sevens, optionally off its alignment; a test
fills it with NaN, lets a kernel write, and asks whether the sevens are still there. `difference`
then says where two tensors first differ, so that a failing test names an element.
"""

import torch

FLOATS = "float32", "bfloat16", "float16"
EDGE = 1 << 16  # guard elements either side of an array: more than a block of any kernel


def guarded(values, dtype, device="cpu", shift=0):
    """values as an array of this dtype between two guards, and whether the guards are whole."""
    n, start = values.numel(), EDGE + shift
    buffer = torch.full((n + 2 * EDGE + shift,), 7., dtype=dtype, device=device)
    array = buffer[start:start + n].view(values.shape).copy_(values)
    return array, lambda: bool((buffer[:start] == 7).all() and (buffer[start + n:] == 7).all())


def difference(got, want):
    """Index of the first element whose bits differ, or None. Any NaN equals any NaN."""
    assert got.dtype == want.dtype and got.shape == want.shape
    bits = torch.int32 if want.dtype == torch.float32 else torch.int16
    got = got.cpu()
    unequal = (got.view(bits) != want.view(bits)) & ~(got.isnan() & want.isnan())
    return tuple(unequal.nonzero()[0].tolist()) if unequal.any() else None
