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
from .on_numpy import affine, quad_squares, stored

NAME = "torch"
TAKES = "cpu, cuda"


def missing():
    """None, or how to get torch."""
    return None if torch else "torch is not installed: pip install torch"


def update(launch, step):
    """Run a `launch.Launch`; nothing waits for a step counter's value."""
    out, coef = launch.out, launch.coef
    if launch.rows == "step" and hasattr(step, "data_ptr"):
        row = step.clamp(0, len(coef) - 1).reshape(1)
        coef = coef.index_select(0, row)  # coef[step] would wait
    c = coef[:, :, None].unbind(1)
    u = [v.float() for v in launch.operands]
    if launch.draws:
        z = noise.normal(out.shape, launch.seed, launch.sample, step, launch.tag,
                         torch, out.device)
        u.append(z)
    e = affine(c, u, launch.clips, torch.where)
    if launch.result != Result.SQUARES:
        out.copy_(stored(launch, c, e))
    return quad_squares(e, torch) if launch.result else None
