"""The contract composed of torch operations, on any device: correct, not fast.

The noise is minidiff.noise on tensors. Only `*`, `+` and `where` on floats: add(alpha=),
addcmul and lerp contract.
"""

try:
    import torch
except ImportError:
    torch = None

from .. import noise
from .launch import Result
from .on_numpy import affine

NAME = "torch"
TAKES = "cpu, cuda"


def missing():
    """None, or how to get torch."""
    return None if torch else "torch is not installed: pip install torch"


def normal(shape, seed, sample, step, tag, device):
    """noise.normal as a tensor; shape (batch, size), step an int or a 0-d int64 tensor."""
    batch, size = shape
    quads = torch.arange(-(-size // 4), device=device)[None, :]
    ids = torch.arange(batch, device=device)[:, None]
    ids = ids + sample & noise.MASK
    quads, ids = torch.broadcast_tensors(quads, ids)
    counter = quads, ids, step & noise.MASK, tag
    key = seed & noise.MASK, seed >> 32
    words = torch.stack(noise.philox(counter, key), -1)
    return noise.elements(noise.to_normal(words, torch), shape)


def quad_squares(e):
    """See on_numpy.quad_squares."""
    gap = -e.shape[1] % 4
    q = torch.nn.functional.pad(e * e, (0, gap))
    q0, q1, q2, q3 = q.unflatten(1, (-1, 4)).unbind(2)
    quads = (q0 + q1) + (q2 + q3)
    return quads.double().sum(1)


def update(launch, step):
    """Run a `launch.Launch`; nothing waits for a step counter's value."""
    out, coef, result = launch.out, launch.coef, launch.result
    if launch.rows == "step" and hasattr(step, "data_ptr"):
        row = step.clamp(0, len(coef) - 1).reshape(1)
        coef = coef.index_select(0, row)  # coef[step] would wait
    elif launch.rows == "step":
        coef = coef[[launch.row(step)]]
    c = coef[:, :, None].unbind(1)
    u = [v.float() for v in launch.operands]
    if launch.draws:
        z = normal(out.shape, launch.seed, launch.sample, step, launch.tag, out.device)
        u.append(z)
    e = affine(c, u, launch.clips, torch.where)
    if result == Result.GRADIENT:
        w = c[2]
        out.copy_(((2. * w) * e) * c[0])
    elif result != Result.SQUARES:
        out.copy_(e)
    return quad_squares(e) if result else None
