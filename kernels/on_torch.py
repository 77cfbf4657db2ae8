"""The contract composed of torch operations, on any device: correct, not fast.

Only `*`, `+` and `where` on floats: add(alpha=), addcmul and lerp contract, and the CPU's
vectorised float32 sqrt is one ulp off for a sixth of its arguments.
"""

try:
    import torch
except ImportError:
    torch = None

from ..noise import ANGLE_SCALE, COS, LOG, LOG_SCALE, MULTIPLIERS, SIN, WEYL

NAME, TAKES = "torch", "tensor"
MASK = 0xFFFFFFFF


def missing():
    """None, or how to get torch."""
    return None if torch else "torch is not installed: pip install torch"


def philox(c0, c1, c2, c3, k0, k1):
    """Four int64 tensors that hold uint32 words; a product may wrap, its bits are the same."""
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & MASK) ^ c1 ^ k0, p1 & MASK, \
            (p0 >> 32 & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = k0 + WEYL[0] & MASK, k1 + WEYL[1] & MASK
    return c0, c1, c2, c3


def _horner(coefficients, x):
    value = coefficients[0]
    for c in coefficients[1:]:
        value = value * x + c
    return value


def _radius(w):
    u = w.float() * 2.**-32 + 2.**-33
    i = u.view(torch.int32).clamp(max=0x3F7FFFFF)
    e = (i - 0x3F2AAAAB) & -0x800000
    t = (i - e).view(torch.float32) + -1.
    v = ((t * t) * _horner(LOG, t) + -2. * t) + e.float() * LOG_SCALE
    return v.double().sqrt().float()


def _cos_sin(w):
    q = (w + (1 << 29) & MASK) >> 30
    d = w - (q << 30)
    a = torch.where(d >= 1 << 31, d - (1 << 32), d).float() * ANGLE_SCALE
    a2 = a * a
    sin, cos = ((_horner(SIN, a2) * a2) * a) + a, _horner(COS, a2)
    odd = q & 1 == 1
    cos, sin = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    return torch.where((q == 1) | (q == 2), -cos, cos), torch.where(q >= 2, -sin, sin)


def normal(shape, seed, sample, step, tag, device):
    """noise.normal as a tensor; shape (batch, size), step an int or a 0-d int64 tensor."""
    batch, size = shape
    quad = torch.arange((size + 3) // 4, device=device)[None, :]
    ids = (torch.arange(batch, device=device)[:, None] + sample) & MASK
    zero = torch.zeros_like(quad + ids)
    w = philox(quad + zero, ids + zero, zero + (step & MASK), zero + tag,
               seed & MASK, seed >> 32 & MASK)
    r0, r1 = _radius(w[0]), _radius(w[2])
    (c0, s0), (c1, s1) = _cos_sin(w[1]), _cos_sin(w[3])
    z = torch.stack((r0 * c0, r0 * s0, r1 * c1, r1 * s1), -1)
    return z.reshape(batch, 4 * z.shape[1])[:, :size]


def _quad_squares(e):
    q = torch.nn.functional.pad(e * e, (0, -e.shape[1] % 4)).unflatten(1, (-1, 4)).unbind(2) \
        if e.numel() else (e,) * 4
    return ((q[0] + q[1]) + (q[2] + q[3])).double().sum(1)


def update(out, operands, coef, draws, clips, shape, seed, sample, step, tag, sums=False):
    """See on_numpy.update; nothing waits for a step counter's value."""
    device = (out if out is not None else operands[0]).device
    coef = torch.as_tensor(coef, device=device)
    if hasattr(step, "data_ptr"):
        coef = coef[step.clamp(0, len(coef) - 1)][None]
    c = coef[:, :, None].unbind(1)
    u = [v.reshape(shape).float() for v in operands]
    if clips:
        p0, p1, lo, hi = c[-4:]
        d = p0 * u[0] + p1 * u[1]
        d = torch.where(d < lo, lo, d)
        u[1] = torch.where(d > hi, hi, d)
    if draws:
        u.append(normal(shape, seed, sample, step, tag, device))
    total = c[0] * u[0]
    for c_k, u_k in zip(c[1:], u[1:]):
        total = total + c_k * u_k
    squares = _quad_squares(total) if sums else None
    if sums and draws and operands:
        total = ((2. * c[2]) * total) * c[0]
    if not sums or draws and operands:
        out.copy_(total.reshape(out.shape))
    return squares
