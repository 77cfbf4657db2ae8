"""The float32 oracle: the contract in NumPy, an operation a line."""

import numpy as np

from .. import noise

NAME, TAKES = "numpy", "cpu"


def missing():
    """NumPy is always there."""
    return None


def affine(c, u, clips, where=np.where):
    """((c0*u0 + c1*u1) + ...), u1 first min(max(p0*u0 + p1*u1, lo), hi), where NaN passes."""
    if clips:
        p0, p1, lo, hi = c[-4:]
        d = p0 * u[0] + p1 * u[1]
        d = where(d < lo, lo, d)
        u = [u[0], where(d > hi, hi, d), *u[2:]]
    total = c[0] * u[0]
    for c_k, u_k in zip(c[1:], u[1:]):
        total = total + c_k * u_k
    return total


def quad_squares(e):
    """sum_j e_j^2 of each row of (B, D), float64: (q0 + q1) + (q2 + q3) in float32 first."""
    q = np.pad(e * e, ((0, 0), (0, -e.shape[1] % 4))).reshape(len(e), -1, 4)
    return ((q[..., 0] + q[..., 1]) + (q[..., 2] + q[..., 3])).astype(np.float64).sum(1)


@np.errstate(over="ignore", invalid="ignore")
def update(out, operands, coef, per_sample, draws, clips, sums, seed, sample, tag, step):
    """out (batch, size), the operands and coef (rows, width) are tensors, checked before.

    See kernels.update; sums: 1 returns the squares and stores nothing, 2 stores the loss's
    gradient (kernels.dsm_loss), 3 the update.
    """
    from torch import from_numpy
    coef, step = coef.numpy(), int(step)
    rows = coef if per_sample else coef[[max(0, min(step, len(coef) - 1))]]
    c = [column[:, None] for column in rows.T]
    u = [v.float().numpy() for v in operands]
    z = [noise.normal(out.shape, seed, sample, step, tag)] if draws else []
    e = affine(c, u + z, clips)
    if sums != 1:
        out.copy_(from_numpy(((np.float32(2) * c[2]) * e) * c[0] if sums == 2 else e))
    return from_numpy(quad_squares(e)) if sums else None
