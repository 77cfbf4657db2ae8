"""The contract composed of torch operations, on any device: correct, not fast.

The noise is minidiff.noise on tensors. Only `*`, `+` and `where` on floats: add(alpha=),
addcmul and lerp contract.
"""

try:
    import torch
except ImportError:
    torch = None

from .. import noise
from .on_numpy import affine

NAME, TAKES = "torch", "cpu, cuda"


def missing():
    """None, or how to get torch."""
    return None if torch else "torch is not installed: pip install torch"


def normal(shape, seed, sample, step, tag, device):
    """noise.normal as a tensor; shape (batch, size), step an int or a 0-d int64 tensor."""
    quads = torch.arange(-(-shape[1] // 4), device=device)[None, :]
    ids = torch.arange(shape[0], device=device)[:, None] + sample & noise.MASK
    counter = *torch.broadcast_tensors(quads, ids), step & noise.MASK, tag
    words = noise.philox(counter, (seed & noise.MASK, seed >> 32))
    return noise.elements(noise.to_normal(torch.stack(words, -1), torch), shape)


def quad_squares(e):
    """See on_numpy.quad_squares."""
    q = torch.nn.functional.pad(e * e, (0, -e.shape[1] % 4)).unflatten(1, (-1, 4)).unbind(2)
    return ((q[0] + q[1]) + (q[2] + q[3])).double().sum(1)


def update(out, operands, coef, per_sample, draws, clips, sums, seed, sample, tag, step):
    """See on_numpy.update; nothing waits for a step counter's value."""
    if not per_sample and hasattr(step, "data_ptr"):
        coef = coef.index_select(0, step.clamp(0, len(coef) - 1).reshape(1))  # [step] would wait
    c = coef[:, :, None].unbind(1)
    u = [v.float() for v in operands]
    z = [normal(out.shape, seed, sample, step, tag, out.device)] if draws else []
    e = affine(c, u + z, clips, torch.where)
    if sums != 1:
        out.copy_(((2. * c[2]) * e) * c[0] if sums == 2 else e)
    return quad_squares(e) if sums else None
