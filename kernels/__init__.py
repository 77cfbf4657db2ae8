"""Fused kernels: one update with its noise drawn inside, the same bits on every backend.

    out = ((c0*u0 + c1*u1) + c2*u2 ...) + cz*z,   z = noise.normal(..., seed, sample, step, tag)

`update` takes coefficients, `apply` a step of the reference and its parameters, `Fused` runs
whole sampling loops; `norms`, `noise_norms` and `dsm_loss` add up squares. Backends: numpy (the
float32 oracle), torch, host (CPU, compiled), triton, cupy; `auto` picks by device.

Example: apply("langevin", x, s, eps=1e-3, seed=0, step=7)
"""

import threading
import warnings
from functools import cache, partial
from importlib import import_module
from operator import index

import numpy as np

from ..affine import coefficients
from ..noise import MASK, PERTURBATION, PREDICTOR, PRIOR
from . import threads  # noqa: F401, here before any fork
from .table import OPS, Op, lookup

__all__ = ["BACKENDS", "OPS", "Fused", "Op", "apply", "backend", "bind", "coefficients",
           "dsm_loss", "missing", "noise_norms", "normal", "norms", "update"]
BACKENDS = "numpy", "torch", "host", "triton", "cupy"
FLOATS = "float32", "bfloat16", "float16"
ROWS = None, "sample", "step"  # what the rows of coef may be said to be
SCHEDULES = 64  # tables that an engine keeps on its device; a loop has up to four


@cache
def _module(name):
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is none of auto, {', '.join(BACKENDS)}")
    return import_module(f".on_{name}", __name__)


def missing(name):
    """Why a backend cannot run on this machine and how to mend it, or None."""
    return _module(name).missing()


def backend(name="auto", device="cpu"):
    """The backend's module, by name, or the fastest for "cpu" or "cuda".

    A named backend never falls back: RuntimeError says what to install.
    """
    if name == "auto":
        order = ("triton", "cupy", "torch") if device == "cuda" else ("host", "torch")
        name = next(n for n in order if not missing(n))
        if name == "torch":  # right, not fast
            warnings.warn(f"backend 'torch' instead of {order[0]}: {missing(order[0])}",
                          stacklevel=2)
    if reason := missing(name):
        raise RuntimeError(f"backend {name!r}: {reason}")
    return _module(name)


# ---- arguments: NumPy arrays become tensors of the same memory ----

@cache
def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _tensor(name, u):
    """An array or tensor as a dense tensor, a copy only where it must be, or one clear line."""
    import torch
    array = isinstance(u, np.ndarray)
    if not array and not isinstance(u, torch.Tensor):
        raise TypeError(f"{name} must be a NumPy array or a torch tensor, got {type(u).__name__}")
    if _name(u.dtype) not in FLOATS:
        raise TypeError(f"{name} must be one of {', '.join(FLOATS)}, got {_name(u.dtype)}")
    if not u.ndim:
        raise ValueError(f"{name} needs a first axis, the samples")
    if array:
        return torch.from_numpy(u if u.flags.carray else np.require(u, None, "CAW"))
    _real(name, u)
    return u if u.is_contiguous() and not u.is_neg() else u.resolve_neg().contiguous()


def _real(name, u):
    """TypeError or RuntimeError where a tensor has no memory of its own to read, or a gradient."""
    import torch
    if not (u.is_cpu or u.is_cuda) or u.layout is not torch.strided or u.is_complex():
        raise TypeError(f"{name} must be a real dense CPU or CUDA tensor, got {u.dtype} on "
                        f"{u.device}, {u.layout}")
    dual = torch.autograd.forward_ad
    if dual._current_level >= 0 and dual.unpack_dual(u).tangent is not None:
        raise RuntimeError(f"{name} carries a forward-mode tangent, which would be lost: pass it "
                           "detached, or take the derivative of the reference's step")
    if isinstance(u, torch._subclasses.FakeTensor) or not u.data_ptr() and u.numel():
        raise TypeError(f"{name} has no memory (a fake or freed tensor); for compilers there is "
                        "torch.ops.minidiff, by import minidiff.kernels.torch_ops")
    if u.requires_grad:
        raise RuntimeError(f"{name} requires grad and this records none: pass it detached, or "
                           "call torch.ops.minidiff, by import minidiff.kernels.torch_ops")


def _accept(arrays, names, chosen):
    """The arrays as tensors of one dtype, shape and device, and the backend for them."""
    tensors = [_tensor(name, u) for name, u in zip(names, arrays)]
    first, t0 = arrays[0], tensors[0]
    for name, u, t in zip(names[1:], arrays[1:], tensors[1:]):
        if isinstance(u, np.ndarray) != isinstance(first, np.ndarray) or t.dtype != t0.dtype:
            raise TypeError(f"{name} is a {type(u).__name__} of {u.dtype}, {names[0]} a "
                            f"{type(first).__name__} of {first.dtype}")
        if t.shape != t0.shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, {names[0]} {tuple(t0.shape)}")
        if t.device != t0.device:
            raise ValueError(f"{name} is on {t.device}, {names[0]} on {t0.device}")
    module = backend(chosen, t0.device.type)
    if t0.device.type not in module.TAKES:
        raise ValueError(f"backend {module.NAME!r} takes arrays on {module.TAKES}, not "
                         f"{t0.device.type}")
    return tensors, module


def _writable(out, t, operands, names):
    """ValueError where out is strided, read-only or shares part of an operand's bytes."""
    array, start = isinstance(out, np.ndarray), t.data_ptr()
    if not (out.flags.c_contiguous and out.flags.aligned if array else t is out):
        raise ValueError("out must be contiguous")
    if array and not out.flags.writeable:
        raise ValueError("out is read-only")
    for name, u in zip(names, operands):
        if abs(u.data_ptr() - start) < t.nbytes and u.data_ptr() != start:
            raise ValueError(f"out overlaps {name} in part: pass that array itself or a new one")


@cache
def _increment_version():
    from torch.autograd.graph import increment_version
    return increment_version


def _changed(out):
    """What tells autograd that a tensor was written: a graph that had saved it then refuses to
    go back, as after torch's own in-place forms. None for what is no tensor."""
    return None if out is None or isinstance(out, np.ndarray) else _increment_version()


def _like(given, t):
    """A result in the kind of what was given."""
    return t.numpy() if isinstance(given, np.ndarray) else t


def _table(coef, device):
    """Coefficients as a contiguous float32 tensor."""
    import torch
    if not isinstance(coef, torch.Tensor):
        coef = np.asarray(coef)
        if coef.dtype.kind not in "fiu":
            raise TypeError(f"coef must hold real numbers, got {coef.dtype}")
        coef = torch.from_numpy(coef.astype(np.float32))
    _real("coef", coef)
    return coef.to(device, torch.float32).contiguous()


def _step(step, like, rows=None):
    """The step as an unsigned integer; a step counter as a tensor, as is a number that chooses
    one of rows."""
    if isinstance(step, int) and rows != "step":
        return step & MASK
    number = isinstance(step, np.generic) or not hasattr(step, "shape")
    if number and rows != "step":
        return index(step) & MASK
    import torch
    if number:
        step = index(step)
        if abs(step) >> 62:  # beyond int64: as far out, and the same noise
            step = (step & MASK) + (1 << 62) * (1 if step > 0 else -1)
        step = torch.from_numpy(np.asarray(step)).to(like.device)
    if not isinstance(step, torch.Tensor):
        step = torch.from_numpy(step)
    if step.shape or step.dtype != torch.int64 or step.device != like.device:
        raise ValueError("a step counter must be a 0-d int64 array or tensor on the operands' "
                         f"device, got {step.dtype} {tuple(step.shape)} on {step.device}")
    return step


def _prepare(module, out, operands, coef, widths, counter, rows="sample", sums=0):
    """Check coef; returns run(step), which gives the sums of squares a sample, float64, or None.

    counter: seed, sample, tag. rows: of coef, one a sample, or a table that the step chooses from.
    sums: 1 stores nothing, 2 the gradient ((2*w)*e)*c0, 3 e itself.
    """
    batch, shape, (seed, sample, tag) = len(out), tuple(coef.shape), counter
    draw = index(seed) & (1 << 64) - 1, index(sample) & MASK, index(tag) & MASK
    table = rows == "step"
    if not shape or shape[-1] not in widths:
        raise ValueError(f"coef has shape {shape}: its last axis must be "
                         f"{' or '.join(map(str, widths))} long")
    if not all(shape) and batch:
        raise ValueError(f"coef has shape {shape}: it holds no row")
    if len(shape) > 2 or len(shape) == 2 and not table and shape[0] != batch:
        raise ValueError(f"coef has shape {shape}: one row a sample needs {batch} rows for "
                         f"operands of shape {tuple(out.shape)}")
    if not out.numel():
        return lambda step: out.new_zeros(batch).double() if sums else None
    out, *operands = (u if u.dim() == 2 else u.view(batch, -1) for u in (out, *operands))
    extra = shape[-1] - len(operands)  # 1 for noise, 2 with a weight, and 4 for a clip stage
    bind = getattr(module, "bind", None) or partial(partial, module.update)
    return bind(out, operands, coef.view(-1, shape[-1]), len(shape) == 2 and not table,
                extra % 4 > 0, extra > 3, sums, *draw)


# ---- the primitives ----

def bind(operands, coef, **kw):
    """f(step): this `update` on these very arrays, its arguments checked once; f returns out.

    For loops whose buffers stay: a call on the host costs about a microsecond. coef is copied;
    one thread at a time may call f. It takes a number, or a counter where `step` was one.
    ValueError for arrays that are not dense.
    """
    return _bind([*operands], coef, True, **kw)


def _bind(operands, coef, again, *, seed=0, sample=0, step=0, tag=PREDICTOR, out=None,
          backend="auto", names=(), rows=None):
    """See bind; where it is called but once, operands may be copied and coef need not be."""
    if rows not in ROWS:
        raise ValueError(f"rows must be 'sample' or 'step', got {rows!r}")
    given, k = operands + ([] if out is None else [out]), len(operands)
    if k > 4:
        raise ValueError(f"at most 4 operands, got {k}")
    if not given:
        raise ValueError("out is needed where there is no operand")
    names = [*(names or (f"operands[{i}]" for i in range(k))), "out"]
    tensors, module = _accept(given, names, backend)
    like, inputs, first = tensors[0], tensors[:k], _step(step, tensors[0], rows)
    for name, u, t in zip(names, given, tensors) if again else ():
        if t.data_ptr() != (u.ctypes.data if isinstance(u, np.ndarray) else u.data_ptr()):
            raise ValueError(f"{name} must be contiguous and writeable to be bound")
    target = like.new_empty(like.shape) if out is None else tensors[k]
    seen = again or out is not None  # what is written may have been read before
    if out is None:
        out = _like(given[0], target)
    else:
        _writable(out, target, inputs, names)
    widths = (k, k + 1, k + 4, k + 5)[:4 if k > 1 else 2] if k else (1,)
    coef = _table(coef, like.device)
    if coef.dim() == 2 and rows is None and not isinstance(first, int):
        raise ValueError('coef has rows and step is a counter: say rows="step" where it chooses '
                         'one of them, rows="sample" where each sample has its own')
    run = _prepare(module, target, inputs, coef.clone() if again else coef, widths,
                   (seed, sample, tag), rows)
    changed = _changed(out) if seen else None

    def launch(step):
        step = _step(step, like, rows)
        if isinstance(step, int) != isinstance(first, int):
            raise ValueError("bound with a number for its step, f takes numbers; with a counter, "
                             "counters")
        run(step)
        if changed:
            changed(out)
        return out
    return launch


def update(operands, coef, *, step=0, **kw):
    """out = ((c0*u0 + c1*u1) + ...) + cz*z in float32, rounded once to the operands' dtype.

    operands: none (then `out` gives the shape) to four arrays of one shape, dtype (float32,
      bfloat16, float16) and device; the first axis is the samples.
    coef: (K,), or (K + 1,) where the last multiplies the noise; with four more, p0, p1, lo, hi,
      u1 first becomes min(max(p0*u0 + p1*u1, lo), hi). (batch, ...) for one row a sample.
    seed, sample, step, tag: the noise's counter (minidiff.noise); sample is the first row's id.
      step is a number or a step counter, a 0-d int64 array or tensor that a GPU reads when it
      comes to it: nothing waits.
    rows: what the rows of coef are. "sample": one a sample. "step": a table (N, ...) of which
      step chooses one, clamped to 0 ... N - 1. Beside a counter it must be said.
    out: where to write; may be an operand itself (in place), may not overlap one otherwise.
    backend: "auto" or a name; names: the operands', for messages.
    Returns out. TypeError, ValueError and RuntimeError say which argument and why.
    """
    return _bind([*operands], coef, False, step=step, **kw)(step)


def normal(shape, dtype="float32", device=None, *, tag=PRIOR, out=None, **kw):
    """z ~ N(0, I): an array of `shape`, NumPy, or a torch tensor where `device` is given.

    Keywords as in `update`: seed, sample, step, tag, backend; `out` is filled if given. The tag
    is PRIOR's, so that no op, which has another, draws the same again.
    """
    if out is not None and tuple(out.shape) != tuple(shape):
        raise ValueError(f"out has shape {tuple(out.shape)}, not {tuple(shape)}")
    if out is None and device is None:
        out = np.empty(shape, dtype)
    elif out is None:
        import torch
        if dtype not in FLOATS:
            raise TypeError(f"dtype must be one of {', '.join(FLOATS)}, got {dtype}")
        out = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    return update([], [1.], tag=tag, out=out, **kw)


def norms(x, *, backend="auto"):
    """|x_b| of each sample, float32 (batch,): squares a quad in float32, quads in float64."""
    (u,), module = _accept([x], ["x"], backend)
    run = _prepare(module, u, [u], u.new_ones(1).float(), (1,), (0, 0, 0), sums=1)
    return _like(x, run(0).sqrt().float())


def noise_norms(like, *, seed=0, sample=0, step=0, tag=PREDICTOR, out=None, backend="auto"):
    """|z_b| of the noise an update of `like`'s shape draws, float32 (batch,). z itself goes to
    `out`, if given, and else nowhere."""
    (u, *t), module = _accept([like] if out is None else [like, out], ["like", "out"], backend)
    if t:
        _writable(out, *t, (), ())
    run = _prepare(module, *(t or [u]), [], u.new_ones(1).float(), (1,), (seed, sample, tag),
                   sums=3 if t else 1)
    squares = run(_step(step, u))
    if changed := _changed(out):
        changed(out)
    return _like(like, squares.sqrt().float())


def dsm_loss(s, coef, *, seed=0, sample=0, step=0, tag=PERTURBATION, backend="auto"):
    """Denoising score matching, value and gradient in one pass, its noise drawn again.

        e = c0*s + cz*z,  value = sum_b w_b |e_b|^2,  gradient = ((2*w)*e)*c0

    s: (batch, ...), the network's output; coef: rows (c0, cz, w), (batch, 3) or (3,). With
    (c0, cz) = coefficients(score_matching.residual, sigma=sigma) and w = weight / (2 batch) the
    value is score_matching.denoising. The noise is that of apply("perturb", ...) with the same
    seed, sample, step and tag. Returns (float32 scalar, gradient of s's dtype).
    """
    (u,), module = _accept([s], ["s"], backend)
    table, gradient, step = _table(coef, u.device), u.new_empty(u.shape), _step(step, u)
    run = _prepare(module, gradient, [u], table, (3,), (seed, sample, tag), sums=2)
    value = (table[..., 2].double() * run(step)).sum().float()
    return _like(s, value)[()], _like(s, gradient)


# ---- the reference's steps on them ----

def apply(op, *operands, clip=None, seed=0, sample=0, step=0, tag=None, out=None,
          backend="auto", **parameters):
    """A step of the reference, fused: its name in OPS or the function, operands without z.

    parameters: the step's own, numbers, or arrays (batch,) for one a sample, whatever `step` is.
    clip: (lo, hi) for a row with a denoise stage. tag: by default what the op draws for, `Op.tag`.

    Example: apply("perturb", x0, a=a, sigma=sigma, seed=0, step=iteration)
    """
    op = lookup(op)
    if len(operands) != len(op.operands):
        raise TypeError(f"{op.name} takes {', '.join(op.operands) or 'no operand'}, "
                        f"got {len(operands)} operands")
    tag = op.tag if tag is None else tag
    return update(operands, op.coefficients(clip, **parameters), rows="sample", seed=seed,
                  sample=sample, step=step, tag=tag, out=out, backend=backend, names=op.operands)


class Fused:
    """The engine of minidiff.samplers' loops on a backend: a step's coefficients once a schedule,
    then one fused update a step.

    k may be a 0-d int64 tensor on the device: nothing waits for it, and a step captured in a CUDA
    graph replays the schedule; the loop adds 1 to it after the step. normal(shape, k, tag), if
    given, is the noise's source instead: arrays like x.

    Example: *_, x = reverse_sde(score, x, VP(), times, Fused(seed=0))
    """

    def __init__(self, seed=0, sample=0, backend="auto", normal=None):
        self.draw, self.backend = {"seed": seed, "sample": sample, "backend": backend}, backend
        self.normal, self.kept, self.tables = normal, threading.local(), {}

    def _uploaded(self, table, device):
        """A schedule's coefficients on a device, the last SCHEDULES of an engine: a loop that has
        run before uploads nothing, so that a CUDA graph can capture it whole. The graph reads
        them for as long as it is replayed: keep the engine, and use it for no more than that."""
        key = str(device), table.shape, table.tobytes()
        if key not in self.tables:
            while len(self.tables) >= SCHEDULES:
                self.tables.pop(next(iter(self.tables)))
            self.tables[key] = _table(table, device)
        return self.tables[key]

    def __call__(self, step, tag, denoise=None, clip=None, **parameters):
        op = lookup(step, denoise)
        given, names = op.coefficients(clip, **parameters), (*op.operands, "z")
        table = None

        def move(k, *u):
            nonlocal table
            if table is None:
                table = self._uploaded(given, getattr(u[0], "device", "cpu"))
            counts = getattr(k, "shape", None) == () and not isinstance(k, np.generic)
            row = table if table.ndim == 1 or counts else table[k]
            rows = "step" if counts else None
            z = (self.normal(tuple(u[0].shape), k, tag),) if self.normal and op.noise else ()
            return update((*u, *z), row, rows=rows, step=k, tag=tag, names=names, **self.draw)
        return move

    def correct(self, step, rule, x, s, k, tag):
        """x becomes step(x, s, z, eps), in place, with eps = rule(|z_b|, |s_b|), one a sample, kept
        on the device. A CPU keeps float32 z for the step. 16 bits would round it, and a GPU makes
        it sooner than it reads it: there z is drawn again."""
        import torch
        draw, tensor = self.draw | {"step": k, "tag": tag}, hasattr(x, "is_cuda")
        kind, z = (type(x), str(x.dtype), x.shape, getattr(x, "device", "cpu")), None
        if self.normal:
            z = self.normal(tuple(x.shape), k, tag)
        elif "float32" in kind[1] and not (tensor and x.is_cuda):
            if getattr(self.kept, "kind", None) != kind:
                self.kept.kind, self.kept.z = kind, (torch if tensor else np).empty_like(x)
            z = self.kept.z
        z_norm = norms(z, backend=self.backend) if self.normal else noise_norms(x, out=z, **draw)
        xp = torch if tensor and x.is_cuda else np  # NumPy's steps are short, on a CPU
        there = x.device if xp is torch else "cpu"
        eps = xp.asarray(rule(*(xp.asarray(v, dtype=xp.float64, device=there)
                                for v in (z_norm, norms(s, backend=self.backend)))), device=there)
        rows = xp.stack([step(*unit, eps=eps) + 0 * eps for unit in np.eye(3).tolist()], -1)
        return update([x, s] if z is None else [x, s, z], rows, out=x, names="xsz",
                      rows="sample", **draw)
