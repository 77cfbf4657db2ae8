"""What a user would write instead, in its best idiomatic form, with its own random numbers.

A peer is made once for a piece of work: make(work) returns f, one call of which computes
sum c_k u_k (+ c_z noise) and returns it; f(z) does so with an explicit z, to be checked.
`passes` counts the arrays it reads or writes, its random numbers apart; `fill(out)` returns
what draws those alone. Both predict its time; the work's own coefficients of 1 cost
nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from statistics import median

import numpy as np
import torch

from ...kernels import build
from ...kernels.launch import NotCompiled
from ..speed.clock import once, waiter
from ..speed.work import expression, formula
from . import schedulers, with_jax, with_mkl


def torch_eager(w):
    """a*x + b*s + c*torch.randn_like(x)"""
    total, u, out = expression(w), w.u, w.out
    if not w.noise:
        return partial(total, *u, None)
    return lambda z=None: total(*u, torch.randn_like(out) if z is None else z)


def torch_inplace(w):
    """out.normal_(std=c).add_(s, alpha=b).add_(x, alpha=a); torch.add(x, s, alpha=b,
    out=out) where there is no noise and a = 1."""
    return _inplace(w, w.out.normal_)


def _inplace(w, fill):
    """The same, out filled by fill(std=)."""
    u, c, clip, out = [*w.u], w.c, w.clip, w.out
    if clip:
        score, u[1] = u[1], torch.empty_like(out)
    first = 0 if w.noise else 1  # how many operands the first call takes
    if not w.noise and c[0] == 1 and len(u) > 1:
        first = 2
    rest = list(zip(u, c))[first:]

    def f(z=None):
        if clip:
            torch.mul(score, clip[1], out=u[1]).add_(u[0], alpha=clip[0]).clamp_(*clip[2:])
        if first == 2:
            torch.add(u[0], u[1], alpha=c[1], out=out)
        elif first == 1:
            torch.mul(u[0], c[0], out=out)
        elif z is None:
            fill(std=c[-1])
        else:
            torch.mul(z, c[-1], out=out)
        for u_k, c_k in rest:
            out.add_(u_k, alpha=c_k)
        return out
    return f


def _inplace_passes(w):
    """Three arrays a call, and two where the first alone is scaled."""
    passes = 3 * len(w.u) + 7 * bool(w.clip)
    if w.noise:
        return passes
    return passes - (3 if w.c[0] == 1 and len(w.u) > 1 else 1)


def torch_compile(w):
    """torch.compile of the expression into out: static shapes, constants compiled in. z is
    drawn outside the graph into its own buffer: inside, a CPU's takes five times as long.
    On a GPU the faster of both."""
    torch._dynamo.reset()  # else the ninth op of a process would silently run uncompiled
    total, u, out, noise = expression(w), w.u, w.out, w.noise
    buffer = torch.empty_like(out)

    @torch.compile(dynamic=False, fullgraph=True)
    def graph(u, z, out):
        out.copy_(total(*u, torch.randn_like(out) if z is None and noise else z))

    def of(draw):
        def f(z=None):
            graph(u, draw() if z is None else z, out)
            return out
        return f
    inside = of(lambda: None)
    outside = of(buffer.normal_) if noise else inside
    return _faster(outside, inside) if out.is_cuda and noise else outside


def _faster(*functions):
    """Of functions that do the same, the one of the least median time."""
    wait = waiter("cuda" if torch.cuda.is_available() else "cpu")
    return min(functions, key=lambda f: median(once(f, wait) for _ in range(9)))


def torch_random(w):
    """torch.func._random.normal_ with one of a thousand keys, then as in place."""
    return _inplace(w, random_fill(w.out))


def mkl(w):
    """Intel's vector generators by inverse distribution function, the fastest of them, on
    as many threads as torch has; then torch's sums in place."""
    return _inplace(w, mkl_fill(w.out))


def mkl_philox(w):
    """The same with Philox, the generator that ours, cuRAND and torch on a GPU draw from."""
    return _inplace(w, philox_fill(w.out))


def jax(w):
    """jax.jit of the expression, jax.random.normal inside."""
    return with_jax.make(w)


def numpy_rng(w):
    """rng.standard_normal(out=z, dtype=np.float32) of NumPy's fastest bit generator, then
    ufuncs with out=."""
    draw, c, clip = numpy_fill(w.out), w.c, w.clip
    u, out = [t.numpy() for t in w.u], w.out.numpy()
    term = np.empty_like(out)
    if clip:
        score, u[1] = u[1], np.empty_like(out)
    rest = list(zip(u, c))
    if not w.noise:  # into out goes a term that is multiplied anyway
        first, scale = rest.pop(next((k for k, v in enumerate(c) if v != 1), 0))

    def f(z=None):
        if clip:
            np.multiply(u[0], clip[0], out=term)
            np.add(np.multiply(score, clip[1], out=u[1]), term, out=u[1])
            np.clip(u[1], *clip[2:], out=u[1])
        if not w.noise:
            np.multiply(first, scale, out=out)
        elif z is None:
            draw()
        else:
            np.copyto(out, z)
        if w.noise and c[-1] != 1:
            np.multiply(out, c[-1], out=out)
        for u_k, c_k in rest:
            np.add(out, u_k if c_k == 1 else np.multiply(u_k, c_k, out=term), out=out)
        return w.out
    return f


def cupy_expr(w):
    """One cupy.ElementwiseKernel of the whole sum; z from cupy.random (cuRAND)."""
    import cupy
    names, total = formula(w, "fminf(fmaxf({}f * u0 + {}f * u1, {}f), {}f)",
                           "{}f * {}".format)
    inputs = ", ".join(f"T {name}" for name in names[:len(w.u) + w.noise])
    kernel = cupy.ElementwiseKernel(inputs, "T out", f"out = {total}", "affine")
    u, out = [cupy.from_dlpack(t) for t in w.u], cupy.from_dlpack(w.out)

    def drawn():
        z = cupy.random.standard_normal(out.shape, np.float32)
        return z.astype(out.dtype, copy=False)

    def f(z=None):
        with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
            if not w.noise:
                kernel(*u, out)
            else:
                kernel(*u, drawn() if z is None else cupy.from_dlpack(z), out)
        return w.out
    return f


def curand(w):
    """cuRAND's library, the faster of Philox and its default: the noise alone, into out."""
    from cupy_backends.cuda.libs import curand as library
    out = w.out

    def of(kind):
        generator = library.createGenerator(kind)

        def f(z=None):
            if z is not None:
                return out.copy_(z)
            library.setStream(generator, torch.cuda.current_stream().cuda_stream)
            library.generateNormal(generator, out.data_ptr(), out.numel(), 0., 1.)
            return out
        return f
    return _faster(of(library.CURAND_RNG_PSEUDO_PHILOX4_32_10),
                   of(library.CURAND_RNG_PSEUDO_DEFAULT))


def diffusers(w):
    """The scheduler's own step(model_output, t, sample), its coefficients and checks
    included."""
    return schedulers.timed(w.op.step, w.u)


def torch_fill(out):
    """Tensor.normal_"""
    return out.normal_


def random_fill(out):
    """torch.func._random.normal_"""
    random = torch.func._random
    keys = cycle(random.split(random.key(0, device=out.device), 1000).unbind())
    return lambda std=1.: random.normal_(next(keys), out, std=std)


def mkl_fill(out):
    """vsRngGaussian of the fastest generator."""
    return _faster(*with_mkl.fillers(out, with_mkl.GENERATORS))


def philox_fill(out):
    """vsRngGaussian of Philox."""
    return _faster(*with_mkl.fillers(out, ["Philox"]))


def jax_fill(out):
    """jax.random.normal"""
    return with_jax.fill(out)


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


def _why_not_compile(op, dtype, cuda):
    if cuda:
        return None
    try:
        build.compiler()
    except NotCompiled as e:
        return f"torch.compile needs a C++ compiler: {e}"
    return None


def _why_not_numpy(op, dtype, cuda):
    if cuda:
        return "NumPy computes on the CPU"
    return None if dtype == "float32" else f"NumPy draws no {dtype}"


def _why_not_random(op, dtype, cuda):
    if not find_spec("torch.func._random"):
        return f"torch {torch.__version__} has no torch.func._random"
    if not cuda:
        return "torch.func._random computes on a GPU"
    return None if op.noise else "torch.func._random draws noise, and this op has none"


def _why_not_mkl(op, dtype, cuda):
    if cuda:
        return "MKL computes on the CPU"
    if not with_mkl.library():
        return "MKL is not installed: pip install mkl"
    if not op.noise:
        return "MKL draws noise, and this op has none"
    return None if dtype == "float32" else f"MKL draws no {dtype}"


def _why_not_jax(op, dtype, cuda):
    return with_jax.why_not(cuda)


def _why_not_cupy(op, dtype, cuda):
    if not cuda:
        return "CuPy computes on an NVIDIA GPU"
    if not find_spec("cupy"):
        return "CuPy is not installed: pip install cupy-cuda13x"
    return "CuPy's kernels know no bfloat16" if dtype == "bfloat16" else None


def _why_not_curand(op, dtype, cuda):
    if op.operands or not op.noise:
        return "cuRAND draws noise and nothing else"
    return _why_not_cupy(op, dtype, cuda) or (
        None if dtype == "float32" else f"cuRAND draws no {dtype}")


def why_not_diffusers():
    """Why diffusers cannot be raced at all, or None."""
    if not find_spec("diffusers"):
        return "diffusers is not installed: pip install diffusers"
    return None


def _why_not_scheduler(op, dtype, cuda):
    return why_not_diffusers() or (
        None if op.step in schedulers.SCHEDULERS else "diffusers has no scheduler for this step")


def _nothing(op, dtype, cuda):
    """Of what is measured everywhere."""


def _terms_passes(w):
    """Each scaled term, each sum and the clip with arrays of its own."""
    return 2 * sum(c != 1 for c in w.c) + 3 * (len(w.c) - 1) + 9 * bool(w.clip)


def _fused_passes(w):
    return len(w.u) + 1 + w.noise


@dataclass(frozen=True)
class Peer:
    """Whom we race.

    make(work) -> f; passes(work); fill(out) -> f.
    why_not(op, dtype, cuda) -> why it does not compute an op here, or None.
    check(work), where it cannot be given z: RuntimeError unless it computes the reference's
    update. The other peers are held to the sum.
    """

    make: Callable
    passes: Callable
    fill: Callable = torch_fill
    why_not: Callable = _nothing
    check: Callable | None = None

    def moved(self, w):
        """Bytes that it reads and writes, its random numbers' own writing included."""
        in_registers = self.make is torch_compile and w.out.is_cuda
        return w.out.nbytes * (self.passes(w) + (w.noise and not in_registers))


PEERS = {peer.make.__name__: peer for peer in (
    Peer(torch_eager, _terms_passes),
    Peer(torch_inplace, _inplace_passes),
    Peer(torch_compile, _fused_passes, why_not=_why_not_compile),
    Peer(torch_random, _inplace_passes, random_fill, _why_not_random),
    Peer(mkl, _inplace_passes, mkl_fill, _why_not_mkl),
    Peer(mkl_philox, _inplace_passes, philox_fill, _why_not_mkl),
    Peer(jax, _fused_passes, jax_fill, _why_not_jax),
    Peer(numpy_rng, _terms_passes, numpy_fill, _why_not_numpy),
    Peer(cupy_expr, _fused_passes, cupy_fill, _why_not_cupy),
    Peer(curand, lambda w: 0, why_not=_why_not_curand),
    Peer(diffusers, lambda w: schedulers.SCHEDULERS[w.op.step].passes,
         why_not=_why_not_scheduler, check=lambda w: schedulers.check(w.op, w.u)))}
