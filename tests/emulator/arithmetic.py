"""What the instructions compute, rounded as their names say."""

import numpy as np

KINDS = {"pred": np.dtype("?")} | {
    f"{letter}{bits}": np.dtype(f"{kind}{bits // 8}")
    for letter, kind in zip("fsub", "fiuu") for bits in (16, 32, 64)}
U32, U64, F32 = (KINDS[k] for k in ("u32", "u64", "f32"))
BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum,
          "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
          "rem": np.fmod, "div": lambda a, b: (a.astype(np.float64) / b).astype(a.dtype)}
UNARY = {"neg": np.negative, "not": np.invert, "cvta": lambda a: a}
COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
           "gt": np.greater, "ge": np.greater_equal}
# what may stand between a name and its type: floats are rounded as said, and contract nothing
MODIFIERS = {(verb, "f"): {("rn",)} for verb in ("add", "sub", "mul")} | {
    ("neg", "f"): {()}, ("mul", "i"): {("lo",), ("hi",), ("wide",)}, ("cvta", "i"): {
        ("to", "global")}} | {(verb, "i"): {()} for verb in (
            "add", "sub", "min", "max", "rem", "div", "neg", "and", "or", "xor", "not")}


def need(true, what=""):
    """NotImplementedError unless true."""
    if not true:
        raise NotImplementedError(what)


def wide(a):
    """Integers as ones of twice the bits."""
    return a.astype(f"{a.dtype.kind}{2 * a.itemsize}")


def shift(name, a, n):
    """shl or shr; by all the bits of a or more leaves nothing, or the sign."""
    last = 8 * a.itemsize - 1
    by = np.minimum(n, last).astype(a.dtype)
    if name == "shr" and a.dtype.kind == "i":
        return a >> by
    return np.where(n > last, 0, a << by if name == "shl" else a >> by).astype(a.dtype)


def fma(a, b, c):
    """float32 a*b + c rounded once: in float64 first, to odd where that is inexact."""
    p, c = a.astype(np.float64) * b, c.astype(np.float64)
    s = p + c
    t = s - p
    error = (p - (s - t)) + (c - t)
    odd = s.view(np.int64) + np.where((error > 0) == (s > 0), 1, -1)
    inexact = np.isfinite(s) & (error != 0) & (s.view(np.int64) % 2 == 0)
    return np.where(inexact, odd.view(np.float64), s).astype(np.float32)


def rsqrt(a):
    """rsqrt.approx.ftz to nearest; a device's may be two units off."""
    a = np.where(np.abs(a) < np.float32(2)**-126, np.copysign(np.float32(0), a), a)
    return (1 / np.sqrt(a.astype(np.float64))).astype(np.float32)


def convert(a, to, source):
    """cvt.to.source."""
    if source == "bf16":
        return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if to == "bf16":
        i = a.view(np.uint32)
        return np.where(np.isnan(a), 0x7FFF, (i + 0x7FFF + (i >> 16 & 1)) >> 16).astype(np.uint16)
    return a.astype(KINDS[to])
