"""The float32 oracle: the contract in NumPy, an operation a line."""

import numpy as np

from .. import noise
from . import threads
from .launch import Result

NAME = "numpy"
TAKES = "cpu"


def why_not():
    """NumPy is always there."""
    return None


def clipped(d, lo, hi, where=np.where):
    """min(max(d, lo), hi); NaN passes."""
    d = where(d < lo, lo, d)
    return where(d > hi, hi, d)


def affine(c, u, clips, where=np.where):
    """((c0*u0 + c1*u1) + ...), u1 first min(max(p0*u0 + p1*u1, lo), hi); NaN passes."""
    if clips:
        p0, p1, lo, hi = c[-4:]
        d = p0 * u[0] + p1 * u[1]
        u = [u[0], clipped(d, lo, hi, where), *u[2:]]
    terms = [c_k * u_k for c_k, u_k in zip(c, u)]
    return sum(terms[1:], terms[0])


def quad_squares(e, xp=np):
    """sum_j e_j^2 of each row, float64; a quad's (q0 + q1) + (q2 + q3) is float32."""
    batch, size = e.shape
    nothing = xp.zeros_like(e[:, :1])
    e = xp.concatenate([e, *[nothing] * (-size % 4)], 1)
    q = (e * e).reshape(batch, -1, 4)
    quads = (q[..., 0] + q[..., 1]) + (q[..., 2] + q[..., 3])
    return noise.cast(quads, xp.float64).sum(1)


def composed(launch, coef, u, step, xp=np, device="cpu"):
    """(what a launch leaves in out, its sums of squares or None) of operands in float32."""
    c = coef.T[..., None]
    if launch.draws:
        z = noise.normal(launch.out.shape, *launch.counter(step), xp=xp, device=device)
        u = [*u, z]
    if launch.result == Result.TERMS:
        squares = [quad_squares(c_k * u_k, xp) for c_k, u_k in zip(c, u)]
        return None, xp.stack(squares, 1)
    e = affine(c, u, launch.clips, xp.where)
    squares = quad_squares(e, xp) if launch.result else None
    if launch.result == Result.GRADIENT:
        e = ((2. * c[2]) * e) * c[0]
    return e, squares


@threads.exact()
@np.errstate(over="ignore", invalid="ignore")
def update(launch, step):
    """Run a `launch.Launch`."""
    from torch import from_numpy
    coef = launch.coef.numpy()
    if launch.rows == "step":
        coef = coef[[launch.row(int(step))]]
    u = [v.float().numpy() for v in launch.operands]
    e, squares = composed(launch, coef, u, step)
    if launch.writes():
        launch.out.copy_(from_numpy(e))
    return from_numpy(squares) if launch.result else None
