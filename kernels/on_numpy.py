"""The float32 oracle: the contract in NumPy, an operation a line."""

import numpy as np

from .. import noise

NAME = "numpy"


def missing():
    """NumPy is always there."""
    return None


def refuses(array):
    """NumPy arrays and CPU tensors."""
    return f"runs on the CPU, not on {array.device}" if getattr(array, "is_cuda", False) else None


def contiguous(array):
    return np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array.contiguous()


def empty_like(array):
    if isinstance(array, np.ndarray):
        return np.empty(array.shape, array.dtype)
    return array.new_empty(array.shape)


def philox(counters, key):
    """The words of (n, 4) uint32 counters, (n, 4)."""
    return np.stack(noise.philox(counters.T, key), -1)


def float32(array):
    """A float32 NumPy copy or view of an array or a CPU tensor."""
    return array.astype(np.float32, copy=False) if isinstance(array, np.ndarray) \
        else array.float().numpy()


def clip(d, lo, hi):
    """min(max(d, lo), hi); NaN passes."""
    d = np.where(d < lo, lo, d)
    return np.where(d > hi, hi, d)


def update(out, operands, coef, draws, clips, shape, seed, sample, step, tag):
    """See kernels.update. coef: float32 (rows, width), checked by the caller."""
    if isinstance(step, np.ndarray) or hasattr(step, "data_ptr"):
        step = int(step)
        coef = coef[[min(step, len(coef) - 1)]]
    c = [column[:, None] for column in coef.T]
    u = [float32(v).reshape(shape) for v in operands]
    if clips:
        p0, p1, lo, hi = c[-4:]
        u[1] = clip(p0 * u[0] + p1 * u[1], lo, hi)
    if draws:
        u.append(noise.normal(shape, seed, sample, step, tag))
    total = c[0] * u[0]
    for c_k, u_k in zip(c[1:], u[1:]):
        total = total + c_k * u_k
    if isinstance(out, np.ndarray):
        out[...] = total.reshape(out.shape)
    else:
        from torch import from_numpy
        out.copy_(from_numpy(total).reshape(out.shape))
