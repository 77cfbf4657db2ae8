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


def stored(launch, c, e):
    """What an update leaves in out: e, or the loss's gradient ((2*w)*e)*c0."""
    return ((2. * c[2]) * e) * c[0] if launch.result == Result.GRADIENT else e


def quad_squares(e, xp=np):
    """sum_j e_j^2 of each row, float64; a quad's (q0 + q1) + (q2 + q3) is float32."""
    batch, size = e.shape
    nothing = xp.zeros_like(e[:, :1])
    e = xp.concatenate([e, *[nothing] * (-size % 4)], 1)
    q = (e * e).reshape(batch, -1, 4)
    quads = (q[..., 0] + q[..., 1]) + (q[..., 2] + q[..., 3])
    return noise.cast(quads, xp.float64).sum(1)


@np.errstate(over="ignore", invalid="ignore")
def update(launch, step):
    """Run a `launch.Launch`."""
    from torch import from_numpy
    out = launch.out
    coef, step = launch.coef.numpy(), int(step)
    if launch.rows != "sample":
        coef = coef[[launch.row(step)]]
    c = [column[:, None] for column in coef.T]
    u = [v.float().numpy() for v in launch.operands]
    if launch.draws:
        z = noise.normal(out.shape, launch.seed, launch.sample, step, launch.tag)
        u.append(z)
    e = affine(c, u, launch.clips)
    if launch.result != Result.SQUARES:
        out.copy_(from_numpy(stored(launch, c, e)))
    return from_numpy(quad_squares(e)) if launch.result else None
