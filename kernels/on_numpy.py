"""The float32 oracle: the contract in NumPy, an operation a line."""

import numpy as np

from .. import noise

NAME, TAKES = "numpy", "cpu"


def missing():
    """NumPy is always there."""
    return None


def float32(array):
    """A float32 NumPy copy or view of an array or a CPU tensor."""
    return array.astype(np.float32, copy=False) if isinstance(array, np.ndarray) \
        else array.float().numpy()


def clip(d, lo, hi):
    """min(max(d, lo), hi); NaN passes."""
    d = np.where(d < lo, lo, d)
    return np.where(d > hi, hi, d)


def quad_squares(e):
    """sum_j e_j^2 of each row of (B, D), float64: (q0 + q1) + (q2 + q3) in float32 first."""
    q = np.zeros((len(e), -(-e.shape[1] // 4) * 4), np.float32)
    q[:, :e.shape[1]] = e * e
    q = q.reshape(len(e), q.shape[1] // 4, 4)
    return ((q[..., 0] + q[..., 1]) + (q[..., 2] + q[..., 3])).astype(np.float64).sum(1)


@np.errstate(over="ignore", invalid="ignore")
def update(out, operands, coef, draws, clips, shape, seed, sample, step, tag, sums=False):
    """See kernels.update and kernels.dsm_loss. coef: float32 (rows, width), checked before."""
    if isinstance(step, np.ndarray) or hasattr(step, "data_ptr"):
        step = int(step)
        coef = coef[[max(0, min(step, len(coef) - 1))]]
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
    squares = quad_squares(total) if sums else None
    if sums and draws and operands:
        total = ((np.float32(2) * c[2]) * total) * c[0]
    if sums and not (draws and operands):
        return squares
    if isinstance(out, np.ndarray):
        out[...] = total.reshape(out.shape)
    else:
        from torch import from_numpy
        out.copy_(from_numpy(total).reshape(out.shape))
    return squares
