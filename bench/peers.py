"""What a user would write instead, in its best idiomatic form, with its own random numbers.

A peer is made once for an op: peer(c, u, z) returns f, one call of which computes
sum c_k u_k (+ c_z noise) into its own buffers. With an explicit z it can be checked.
c: floats, the noise's last if there is any; u: the operands; out: a buffer of their shape.
"""

import torch


def torch_eager(c, u, out, z=None):
    """a*x + b*s + c*torch.randn_like(x)"""
    def f():
        noise = [torch.randn_like(out) if z is None else z] if len(c) > len(u) else []
        total, *rest = (c_k * u_k for c_k, u_k in zip(c, [*u, *noise]))
        for term in rest:
            total = total + term
        return total
    return f


def torch_inplace(c, u, out, z=None):
    """z.normal_().mul_(c).add_(s, alpha=b).add_(x, alpha=a)"""
    def f():
        if len(c) > len(u):
            (out.normal_() if z is None else out.copy_(z)).mul_(c[-1])
            rest = list(zip(c, u))
        else:
            torch.mul(u[-1], c[-1], out=out)
            rest = list(zip(c, u))[:-1]
        for c_k, u_k in reversed(rest):
            out.add_(u_k, alpha=c_k)
        return out
    return f


def torch_compile(c, u, out, z=None):
    """torch.compile of the eager form; static shapes. On a CPU z is drawn outside the graph:
    its own fused normal takes five times torch.randn there."""
    outside = z is None and out.device.type == "cpu" and len(c) > len(u)

    @torch.compile(dynamic=False)
    def graph(u, z):
        return torch_eager(c, u, out, z)()
    return lambda: graph(u, torch.randn_like(out) if outside else z)


PEERS = {f.__name__: f for f in (torch_eager, torch_inplace, torch_compile)}
