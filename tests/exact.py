"""Whole arrays, bit for bit.

A kernel whose values are right may still write a few elements too far, or leave some
unwritten. `kernels.check.compare.guarded` puts an array into a larger buffer that is full of
sevens, off its alignment if asked; a test fills it with NaN, lets a kernel write, and asks
whether the sevens are still there. `difference` says where two tensors first differ, so that
a failing test names an element.
"""

import torch

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
