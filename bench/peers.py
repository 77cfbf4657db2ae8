"""What a user would write instead, in its best idiomatic form, with its own random numbers.

A peer is made once for an op: peer(c, clip, u, out, z) returns f, one call of which computes
sum c_k u_k (+ c_z noise) into its own buffers. With an explicit z it can be checked.
c: floats, the noise's last if there is any; u: the operands; out: a buffer of their shape;
clip: p0, p1, lo, hi of a denoise stage.
"""

import torch


def torch_eager(c, clip, u, out, z=None):
    """a*x + b*s + c*torch.randn_like(x)"""
    def f():
        noise = [torch.randn_like(out) if z is None else z] if len(c) > len(u) else []
        v = u if clip is None else [u[0], (clip[0] * u[0] + clip[1] * u[1]).clamp(*clip[2:])]
        total, *rest = (c_k * v_k for c_k, v_k in zip(c, [*v, *noise]))
        for term in rest:
            total = total + term
        return total
    return f


def torch_inplace(c, clip, u, out, z=None):
    """z.normal_().mul_(c).add_(s, alpha=b).add_(x, alpha=a)"""
    d = None if clip is None else torch.empty_like(out)

    def f():
        v = u
        if clip is not None:
            torch.mul(u[1], clip[1], out=d).add_(u[0], alpha=clip[0]).clamp_(*clip[2:])
            v = [u[0], d]
        if len(c) > len(u):
            (out.normal_() if z is None else out.copy_(z)).mul_(c[-1])
            rest = list(zip(c, v))
        else:
            torch.mul(v[-1], c[-1], out=out)
            rest = list(zip(c, v))[:-1]
        for c_k, u_k in reversed(rest):
            out.add_(u_k, alpha=c_k)
        return out
    return f


def torch_compile(c, clip, u, out, z=None):
    """torch.compile of the eager form; static shapes. On a CPU z is drawn outside the graph:
    its own fused normal takes five times torch.randn there."""
    outside = z is None and out.device.type == "cpu" and len(c) > len(u)

    @torch.compile(dynamic=False)
    def graph(u, z):
        return torch_eager(c, clip, u, out, z)()
    return lambda: graph(u, torch.randn_like(out) if outside else z)


def composed_loss(s, coef):
    """The denoising loss of torch operations and its gradient by autograd, with torch.randn."""
    s = s.detach().requires_grad_()
    e = coef[:, :1] * s + coef[:, 1:2] * torch.randn_like(s)
    loss = (coef[:, 2] * e.square().sum(1)).sum()
    loss.backward()
    return loss, s.grad


def eager_corrector(x, s, snr=.16):
    """One Langevin correction with each sample's own step size, of torch operations."""
    z = torch.randn_like(x)
    alpha = 2 * (snr * z.norm(dim=1) / s.norm(dim=1)).square()[:, None]
    return x + alpha * s + (2 * alpha).sqrt() * z


PEERS = {f.__name__: f for f in (torch_eager, torch_inplace, torch_compile)}
