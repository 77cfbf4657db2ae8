"""What a user would write instead, in its best idiomatic form, with its own random numbers.

A peer is made once for a piece of work: make(work) returns f, one call of which computes
sum c_k u_k (+ c_z noise) and returns it; f(z) does so with an explicit z, to be checked.
`passes` counts the arrays it reads or writes, its random numbers apart; `fill(out)` returns
what draws those alone. Both predict its time; the work's own coefficients of 1 cost nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch

from ..kernels import Op, on_host
from . import schedulers


@dataclass(frozen=True)
class Work:
    """One update: c, the noise's coefficient last if there is any; clip: p0, p1, lo, hi of a
    denoise stage or None; u: the operands; out: a buffer of their shape."""

    op: Op
    c: list
    clip: list | None
    u: list
    out: torch.Tensor

    @property
    def scaled(self):
        """How many terms have a coefficient to multiply by."""
        return sum(c_k != 1 for c_k in self.c)


def torch_eager(w):
    """a*x + b*s + c*torch.randn_like(x)"""
    def f(z=None):
        return composed(w, torch.randn_like(w.out) if z is None and w.op.noise else z)
    return f


def composed(w, z):
    """The sum as an expression, of any library's arrays."""
    v = w.u if w.clip is None else \
        [w.u[0], (w.clip[0] * w.u[0] + w.clip[1] * w.u[1]).clip(*w.clip[2:])]
    total, *rest = (v_k if c_k == 1 else c_k * v_k
                    for c_k, v_k in zip(w.c, [*v, z] if w.op.noise else v))
    for term in rest:
        total = total + term
    return total


def torch_inplace(w):
    """out.normal_(std=c).add_(s, alpha=b).add_(x, alpha=a); torch.add(x, s, alpha=b, out=out)
    where there is no noise and a = 1."""
    d = None if w.clip is None else torch.empty_like(w.out)

    def f(z=None):
        v, out = w.u, w.out
        if d is not None:
            torch.mul(v[1], w.clip[1], out=d).add_(v[0], alpha=w.clip[0]).clamp_(*w.clip[2:])
            v = [v[0], d]
        rest = list(zip(w.c, v))
        if w.op.noise and z is None:
            out.normal_(std=w.c[-1])
        elif w.op.noise:
            torch.mul(z, w.c[-1], out=out)
        elif w.c[0] == 1 and len(v) > 1:
            torch.add(v[0], v[1], alpha=w.c[1], out=out)
            rest = rest[2:]
        else:
            torch.mul(v[-1], w.c[-1], out=out)
            rest = rest[:-1]
        for c_k, u_k in reversed(rest):
            out.add_(u_k, alpha=c_k)
        return out
    return f


def _inplace_passes(w):
    k = len(w.u)
    affine = 3 * k if w.op.noise else 3 * (k - 1) if w.c[0] == 1 and k > 1 else 3 * k - 1
    return affine + 7 * (w.clip is not None)


def torch_compile(w):
    """torch.compile of the expression into out: static shapes, constants compiled in. z is drawn
    outside the graph into its own buffer: inside, a CPU's takes five times as long. On a GPU the
    faster of both."""
    torch._dynamo.reset()  # else the ninth op of a process would silently run uncompiled
    buffer = torch.empty_like(w.out) if w.op.noise else None

    @torch.compile(dynamic=False, fullgraph=True)
    def graph(u, z, out):
        out.copy_(composed(Work(w.op, w.c, w.clip, u, out),
                           torch.randn_like(out) if z is None and buffer is not None else z))

    def outside(z=None):
        graph(w.u, buffer.normal_() if z is None and buffer is not None else z, w.out)
        return w.out

    def inside(z=None):
        graph(w.u, z, w.out)
        return w.out
    if w.out.is_cuda and w.op.noise:
        from .clock import once
        times = {f: [once(f, torch.cuda.synchronize) for _ in range(9)][4:]
                 for f in (outside, inside)}
        return min(times, key=lambda f: sorted(times[f])[2])
    return outside


def numpy_rng(w):
    """rng.standard_normal(out=z, dtype=np.float32) of NumPy's fastest bit generator, then
    ufuncs with out=."""
    rng = np.random.Generator(np.random.SFC64())
    u, out = [t.numpy() for t in w.u], w.out.numpy()
    term = np.empty_like(out)
    d = None if w.clip is None else np.empty_like(out)

    def f(z=None):
        v = u
        if d is not None:
            np.multiply(u[0], w.clip[0], out=term)
            np.add(np.multiply(u[1], w.clip[1], out=d), term, out=d)
            v = [u[0], np.clip(d, *w.clip[2:], out=d)]
        if not w.op.noise:
            np.multiply(v[-1], w.c[-1], out=out)
        elif z is None:
            rng.standard_normal(out=out, dtype=np.float32)
        else:
            out[...] = z
        if w.op.noise and w.c[-1] != 1:
            np.multiply(out, w.c[-1], out=out)
        for c_k, v_k in zip(w.c, v if w.op.noise else v[:-1]):
            np.add(out, v_k if c_k == 1 else np.multiply(v_k, c_k, out=term), out=out)
        return w.out
    return f


def cupy_expr(w):
    """One cupy.ElementwiseKernel of the whole sum; z from cupy.random (cuRAND)."""
    import cupy
    v = [f"u{i}" for i in range(len(w.u))]
    code = ""
    if w.clip is not None:
        code = "float d = fminf(fmaxf({}f * u0 + {}f * u1, {}f), {}f); ".format(
            *map(float, w.clip))
        v[1] = "d"
    terms = [f"{float(c)}f * {name}" for c, name in zip(w.c, [*v, "z"])]
    inputs = [f"T {name}" for name in [*(f"u{i}" for i in range(len(w.u))),
                                       *(["z"] if w.op.noise else [])]]
    kernel = cupy.ElementwiseKernel(", ".join(inputs), "T out",
                                    code + "out = " + " + ".join(terms), "affine")
    u, out = [cupy.from_dlpack(t) for t in w.u], cupy.from_dlpack(w.out)

    def f(z=None):
        with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
            noise = [] if not w.op.noise else [
                cupy.random.standard_normal(out.shape, np.float32).astype(out.dtype, copy=False)
                if z is None else cupy.from_dlpack(z)]
            kernel(*u, *noise, out)
        return w.out
    return f


def diffusers(w):
    """The scheduler's own step(model_output, t, sample), its coefficients and checks included."""
    return schedulers.timed(w.op.step, w.u)


def torch_fill(out):
    """Tensor.normal_"""
    return out.normal_


def numpy_fill(out):
    """Generator.standard_normal(out=)"""
    rng, a = np.random.Generator(np.random.SFC64()), out.numpy()
    return lambda: rng.standard_normal(out=a, dtype=np.float32)


def cupy_fill(out):
    """cupy.random.standard_normal"""
    import cupy

    def f():
        with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
            cupy.random.standard_normal(tuple(out.shape), np.float32)
    return f


def _nothing(op, dtype, cuda):
    """What torch itself lacks."""


def _lacks_compile(op, dtype, cuda):
    return None if cuda or on_host.compiler() else "torch.compile needs a C++ compiler"


def _lacks_numpy(op, dtype, cuda):
    if cuda:
        return "NumPy computes on the CPU"
    return None if dtype == "float32" else f"NumPy draws no {dtype}"


def _lacks_cupy(op, dtype, cuda):
    if not cuda:
        return "CuPy computes on an NVIDIA GPU"
    if not find_spec("cupy"):
        return "CuPy is not installed: pip install cupy-cuda13x"
    return "CuPy's kernels know no bfloat16" if dtype == "bfloat16" else None


def _lacks_diffusers(op, dtype, cuda):
    if not find_spec("diffusers"):
        return "diffusers is not installed: pip install diffusers"
    return None if op.step in schedulers.SCHEDULERS else "diffusers has no scheduler for this step"


@dataclass(frozen=True)
class Peer:
    """make(work) -> f; passes(work); fill(out) -> f; lacks(op, dtype, cuda) -> a reason or None."""

    make: Callable
    passes: Callable
    fill: Callable = torch_fill
    lacks: Callable = _nothing


PEERS = {peer.make.__name__: peer for peer in (
    Peer(torch_eager, lambda w: 2 * w.scaled + 3 * (len(w.c) - 1) + 9 * (w.clip is not None)),
    Peer(torch_inplace, _inplace_passes),
    Peer(torch_compile, lambda w: len(w.u) + 1 + w.op.noise, lacks=_lacks_compile),
    Peer(numpy_rng, lambda w: 2 * w.scaled + 3 * (len(w.c) - 1) + 9 * (w.clip is not None),
         numpy_fill, _lacks_numpy),
    Peer(cupy_expr, lambda w: len(w.u) + 1 + w.op.noise, cupy_fill, _lacks_cupy),
    Peer(diffusers, lambda w: schedulers.SCHEDULERS[w.op.step].passes, lacks=_lacks_diffusers))}


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
