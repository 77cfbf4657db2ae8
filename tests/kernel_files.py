"""Files of kernels that users might write: good ones, parts of wrong ones."""

import textwrap

HEAD = """
import ctypes, os, signal, sys, threading, time
import numpy as np
from minidiff import noise
def columns(x, coef):
    return [k.reshape(-1, *[1] * (x.ndim - 1)) for k in np.moveaxis(coef, -1, 0)]
def right(x, s, z, coef):
    a, b, c = columns(x, coef)
    return (a * x + b * s) + c * z
def put(array, at, value):
    place = array.ctypes.data + array.itemsize * at
    ctypes.c_float.from_address(place).value = value
calls, kept = 0, {}
"""
NUMPY = """
import numpy as np
def langevin(x, s, z, coef):
    a, b, c = (k.reshape(-1, *[1] * (x.ndim - 1)) for k in np.moveaxis(coef, -1, 0))
    return (a * x + b * s) + c * z
def ddpm_clipped(x, s, z, coef, clip):
    a, b, c = (k.reshape(-1, *[1] * (x.ndim - 1)) for k in np.moveaxis(coef, -1, 0))
    p0, p1, lo, hi = (k.reshape(-1, *[1] * (x.ndim - 1)) for k in np.moveaxis(clip, -1, 0))
    d = p0 * x + p1 * s
    d = np.where(d < lo, lo, d)
    d = np.where(d > hi, hi, d)
    return (a * x + b * d) + c * z
"""
TRITON = """
import torch, triton
import triton.language as tl
ARRAYS = "torch"
@triton.jit
def kernel(x, s, z, coef, out, n, size, step, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    c = coef + i // size * step
    a, b, d = (tl.load(c, mask), tl.load(c + 1, mask), tl.load(c + 2, mask))
    r = (a * tl.load(x + i, mask) + b * tl.load(s + i, mask)) + d * tl.load(z + i, mask)
    tl.store(out + i, r, mask)
def langevin(x, s, z, coef, out):
    if x.numel():
        step = 3 if coef.ndim > 1 else 0
        kernel[triton.cdiv(x.numel(), 4096),](x, s, z, coef, out, x.numel(), x[:1].numel(), step,
                                              BLOCK=4096)
"""


def source(kinds):
    """A file of them, each a version of langevin."""
    text = HEAD
    for k, (arguments, body, *_) in enumerate(kinds.values()):
        text += f"def langevin_v{k}({arguments}):\n" + textwrap.indent(body.strip(), "    ") + "\n"
    return text


def said(row):
    """All that a row says."""
    return f"{row['reason']}; {row['explained']}"
