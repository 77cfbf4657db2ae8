"""The float32 oracle: the contract in NumPy, an operation a line."""

import numpy as np

from .. import noise
from .launch import Result

NAME = "numpy"
TAKES = "cpu"


def missing():
    """NumPy is always there."""
    return None


def affine(c, u, clips, where=np.where):
    """((c0*u0 + c1*u1) + ...), u1 first min(max(p0*u0 + p1*u1, lo), hi); NaN passes."""
    if clips:
        p0, p1, lo, hi = c[-4:]
        d = p0 * u[0] + p1 * u[1]
        d = where(d < lo, lo, d)
        d = where(d > hi, hi, d)
        u = [u[0], d, *u[2:]]
    total = c[0] * u[0]
    for c_k, u_k in zip(c[1:], u[1:]):
        total = total + c_k * u_k
    return total


def quad_squares(e):
    """sum_j e_j^2 of each row, float64; a quad's (q0 + q1) + (q2 + q3) is float32."""
    batch, size = e.shape
    gap = -size % 4
    q = np.pad(e * e, ((0, 0), (0, gap)))
    q0, q1, q2, q3 = q.reshape(batch, -1, 4).transpose(2, 0, 1)
    quads = (q0 + q1) + (q2 + q3)
    return quads.astype(np.float64).sum(1)


@np.errstate(over="ignore", invalid="ignore")
def update(launch, step):
    """Run a `launch.Launch`."""
    from torch import from_numpy
    out, result = launch.out, launch.result
    coef, step = launch.coef.numpy(), int(step)
    if launch.rows != "sample":
        coef = coef[[launch.row(step)]]
    c = [column[:, None] for column in coef.T]
    u = [v.float().numpy() for v in launch.operands]
    if launch.draws:
        z = noise.normal(out.shape, launch.seed, launch.sample, step, launch.tag)
        u.append(z)
    e = affine(c, u, launch.clips)
    if result == Result.GRADIENT:
        w = c[2]
        gradient = ((np.float32(2) * w) * e) * c[0]
        out.copy_(from_numpy(gradient))
    elif result != Result.SQUARES:
        out.copy_(from_numpy(e))
    return from_numpy(quad_squares(e)) if result else None
