"""Fused kernels: one update with its noise drawn inside, the same bits on every backend.

    out = ((c0*u0 + c1*u1) + c2*u2 ...) + cz*z,   z = noise.normal(..., seed, sample, step, tag)

`update` takes coefficients, `apply` a step of the reference and its parameters, `Fused` runs
whole sampling loops; `norms`, `noise_norms` and `dsm_loss` add up squares. Backends: numpy (the
float32 oracle), torch, host (CPU, compiled), triton, cupy; `auto` picks by device.

Example: apply("langevin", x, s, eps=1e-3, seed=0, step=7)
"""

from functools import cache
from importlib import import_module
from math import prod
from operator import index

import numpy as np

from ..affine import coefficients
from .table import OPS, Op, lookup

__all__ = ["BACKENDS", "OPS", "Fused", "Op", "apply", "backend", "coefficients", "dsm_loss",
           "missing", "noise_norms", "normal", "norms", "update"]
BACKENDS = "numpy", "torch", "host", "triton", "cupy"
FLOATS = "float32", "bfloat16", "float16"
KINDS = {"cpu": "NumPy arrays and CPU tensors", "tensor": "torch tensors", "cuda": "CUDA tensors"}


@cache
def _module(name):
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is none of auto, {', '.join(BACKENDS)}")
    return import_module(f".on_{name}", __name__)


def missing(name):
    """Why a backend cannot run on this machine and how to mend it, or None."""
    return _module(name).missing()


def backend(name="auto", array=None):
    """The backend's module, by name, or the fastest for the array's device.

    A named backend never falls back: RuntimeError says what to install.
    """
    if name == "auto":
        order = ("triton", "cupy", "torch") if _device(array) == "cuda" else \
            ("host", "numpy") if isinstance(array, np.ndarray) else ("host", "torch")
        name = next(n for n in order if not missing(n))
    if reason := missing(name):
        raise RuntimeError(f"backend {name!r}: {reason}")
    return _module(name)


def _tensor(a):
    return hasattr(a, "data_ptr")


def _device(a):
    return a.device.type if _tensor(a) else "cpu"


def _dtype(a):
    return str(a.dtype).removeprefix("torch.")


def _address(a):
    return a.data_ptr() if _tensor(a) else a.ctypes.data


def _contiguous(a):
    return a.is_contiguous() and not a.is_neg() if _tensor(a) else \
        a.flags.c_contiguous and a.flags.aligned


def _empty_like(a):
    return a.new_empty(a.shape) if _tensor(a) else np.empty(a.shape, a.dtype)


def _accept(arrays, names, chosen):
    """One kind, dtype, shape and device for all arrays, or one clear line; the backend."""
    first = arrays[0]
    for name, u in zip(names, arrays):
        if not (isinstance(u, np.ndarray) or _tensor(u)):
            raise TypeError(f"{name} must be a NumPy array or a torch tensor, "
                            f"got {type(u).__name__}")
        if _dtype(u) not in FLOATS:
            raise TypeError(f"{name} must be one of {', '.join(FLOATS)}, got {_dtype(u)}")
        if _tensor(u) != _tensor(first) or u.dtype != first.dtype:
            raise TypeError(f"{name} is a {type(u).__name__} of {_dtype(u)}, {names[0]} a "
                            f"{type(first).__name__} of {_dtype(first)}")
        if u.shape != first.shape:
            raise ValueError(f"{name} has shape {tuple(u.shape)}, {names[0]} "
                             f"{tuple(first.shape)}")
        if not u.ndim:
            raise ValueError(f"{name} needs a first axis, the samples")
        if _tensor(u) and u.device != first.device:
            raise ValueError(f"{name} is on {u.device}, {names[0]} on {first.device}")
        if _tensor(u) and (_device(u) not in ("cpu", "cuda") or u.is_sparse or u.is_sparse_csr
                           or u.is_mkldnn):
            raise TypeError(f"{name} must be a dense CPU or CUDA tensor, got {u.device} "
                            f"{u.layout}")
        if _tensor(u) and u.numel() and not u.data_ptr():
            raise TypeError(f"{name} has no memory (a fake tensor): call torch.ops.minidiff")
        if getattr(u, "requires_grad", False):
            raise RuntimeError(f"{name} requires grad and this records none: pass it detached, "
                               "or call torch.ops.minidiff (minidiff.kernels.torch_ops)")
    module = backend(chosen, first)
    if not (_tensor(first) if module.TAKES == "tensor" else
            _device(first) == module.TAKES and (_tensor(first) or module.TAKES == "cpu")):
        raise ValueError(f"backend {module.NAME!r} takes {KINDS[module.TAKES]}, not "
                         f"{type(first).__name__} on {_device(first)}")
    return module


def _dense(u):
    """u itself, or a contiguous copy."""
    return u if _contiguous(u) else u.resolve_neg().contiguous() if _tensor(u) else \
        np.ascontiguousarray(u)


def _shape(a):
    """(batch, size of a sample)"""
    return a.shape[0], prod(a.shape[1:])


def _writable(out, operands, names):
    """ValueError where out is strided, read-only or shares part of an operand's bytes."""
    if not _contiguous(out):
        raise ValueError("out must be contiguous")
    if not _tensor(out) and not out.flags.writeable:
        raise ValueError("out is read-only")
    for name, u in zip(names, operands):
        if _address(out) != _address(u) and _address(out) < _address(u) + u.nbytes \
                and _address(u) < _address(out) + out.nbytes:
            raise ValueError(f"out overlaps {name} in part: pass that array itself or a new one")


def _table(array, shape, like):
    """Coefficients as contiguous float32: NumPy on the CPU, else a tensor beside `like`."""
    if _tensor(array) and _device(like) == "cuda":
        return array.float().reshape(shape).to(like.device).contiguous()
    host = array.detach().cpu().double().numpy() if _tensor(array) and not array.is_complex() \
        else np.asarray(array)
    if host.dtype.kind not in "fiu":
        raise TypeError(f"coef must hold real numbers, got {host.dtype}")
    host = np.ascontiguousarray(host.reshape(shape), np.float32)
    if _device(like) == "cpu":
        return host
    from torch import from_numpy
    return from_numpy(host).to(like.device)


def _counted(step):
    return (isinstance(step, np.ndarray) or _tensor(step)) and not step.ndim


def _counter(seed, sample, step, tag):
    """The noise's counter as Python's integers; a step counter stays where it is."""
    step = step if _counted(step) else index(step) & 0xFFFFFFFF
    return index(seed) & (1 << 64) - 1, index(sample) & 0xFFFFFFFF, step, index(tag) & 0xFFFFFFFF


def _rows(coef, widths, batch, step, like):
    """Rows of coef, checked: 1, one a sample, or a table for a step counter."""
    shape, counted = np.shape(coef), _counted(step)
    if not shape or shape[-1] not in widths:
        raise ValueError(f"coef has shape {shape}: its last axis must be "
                         f"{' or '.join(map(str, widths))} long")
    if counted and (_dtype(step) != "int64" or len(shape) != 2 or not shape[0]
                    or _tensor(step) != _tensor(like)
                    or _tensor(step) and step.device != like.device):
        raise ValueError("a step counter must be int64, on the operands' device, with a coef "
                         "table of shape (N, K) or (N, K + 1)")
    if len(shape) > 2 or len(shape) == 2 and not counted and shape[0] != batch:
        raise ValueError(f"coef has shape {tuple(shape)}: one row a sample needs {batch} rows for "
                         f"operands of shape {tuple(like.shape)}")
    return shape[0] if len(shape) == 2 else 1


def update(operands, coef, *, clip=None, seed=0, sample=0, step=0, tag=0, out=None,
           backend="auto", names=()):
    """out = ((c0*u0 + c1*u1) + ...) + cz*z in float32, rounded once to the operands' dtype.

    operands: none (then `out` gives the shape) to four arrays of one shape, dtype (float32,
      bfloat16, float16) and device; the first axis is the samples.
    coef: (K,), or (K + 1,) where the last multiplies the noise; (batch, ...) for one row a
      sample. A table (N, ...) when `step` is a 0-d int64 array or tensor, which then selects
      the row (clamped to N - 1) and is the noise's step: nothing waits for its value.
    clip: (p0, p1, lo, hi), or rows of it like coef's: u1 becomes min(max(p0*u0 + p1*u1, lo), hi).
    seed, sample, step, tag: the noise's counter (minidiff.noise); sample is the first row's id.
    out: where to write; may be an operand itself (in place), may not overlap one otherwise.
    Returns out. TypeError, ValueError and RuntimeError say which argument and why.
    """
    operands = list(operands)
    if len(operands) > 4:
        raise ValueError(f"at most 4 operands, got {len(operands)}")
    if not operands and out is None:
        raise ValueError("out is needed where there is no operand")
    names = list(names or (f"operands[{k}]" for k in range(len(operands))))
    given = operands + ([] if out is None else [out])
    module, first, k = _accept(given, names + ["out"], backend), given[0], len(operands)
    batch, size = _shape(first)
    rows = _rows(coef, (k, k + 1) if k else (1,), batch, step, first)
    draws = np.shape(coef)[-1] > k
    if clip is not None:
        if k < 2:
            raise ValueError("clip needs two operands, x and s")
        if np.shape(clip) not in ((4,), (rows, 4)):
            raise ValueError(f"clip has shape {tuple(np.shape(clip))}, not (4,) or {(rows, 4)}")
        coef, clip = (_table(v, (rows if np.ndim(v) == 2 else 1, np.shape(v)[-1]), first)
                      for v in (coef, clip))
        clip = clip.expand(rows, 4) if _tensor(clip) else np.broadcast_to(clip, (rows, 4))
        join = import_module("torch").cat if _tensor(coef) else np.concatenate
        coef = join((coef, clip), 1)
    operands = [_dense(u) for u in operands]
    out = _empty_like(first) if out is None else out
    _writable(out, operands, names)
    if batch and size:
        module.update(out, operands, _table(coef, (rows, np.shape(coef)[-1]), first), draws,
                      clip is not None, (batch, size), *_counter(seed, sample, step, tag))
    return out


def normal(shape, dtype="float32", device=None, *, out=None, **kw):
    """z ~ N(0, I): an array of `shape`, NumPy, or a torch tensor where `device` is given.

    Keywords as in `update`: seed, sample, step, tag, backend; `out` is filled if given.
    """
    if out is None and device is None:
        out = np.empty(shape, dtype)
    elif out is None:
        import torch
        if dtype not in FLOATS:
            raise TypeError(f"dtype must be one of {', '.join(FLOATS)}, got {dtype}")
        out = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    return update([], [1.], out=out, **kw)


def _squares(module, out, operands, coef, draws, like, counter):
    """sum of squares a row of the affine form, float64 (batch,) of like's kind."""
    if not all(_shape(like)):
        return like.new_zeros(len(like)).double() if _tensor(like) else np.zeros(len(like))
    total = module.update(out, operands, coef, draws, False, _shape(like), *counter, sums=True)
    if _tensor(like) and not _tensor(total):
        from torch import from_numpy
        return from_numpy(total)
    return total


def _float32(a):
    return a.float() if _tensor(a) else np.float32(a)


def _float64(a):
    return a.double() if _tensor(a) else np.float64(a)


def norms(x, *, backend="auto"):
    """|x_b| of each sample, float32 (batch,): squares a quad in float32, quads in float64."""
    module = _accept([x], ["x"], backend)
    coef = _table(np.ones(1), (1, 1), x)
    return _float32(_squares(module, None, [_dense(x)], coef, False, x, (0, 0, 0, 0))**.5)


def noise_norms(like, *, seed=0, sample=0, step=0, tag=0, backend="auto"):
    """|z_b| of the noise an update of `like`'s shape draws, float32 (batch,); no z is stored."""
    module = _accept([like], ["like"], backend)
    coef = _table(np.ones((1, 1)), (1, 1), like)
    out = _dense(like)  # for its shape, type and device: sums write nothing
    counter = _counter(seed, sample, step, tag)
    _rows(np.ones((1, 1)), (1,), 1, step, like)
    return _float32(_squares(module, out, [], coef, True, like, counter)**.5)


def dsm_loss(s, coef, *, seed=0, sample=0, step=0, tag=0, backend="auto"):
    """Denoising score matching, value and gradient in one pass, its noise drawn again.

        e = c0*s + cz*z,  value = sum_b w_b |e_b|^2,  gradient = ((2*w)*e)*c0

    s: (batch, ...), the network's output; coef: rows (c0, cz, w), (batch, 3) or (3,). With
    (c0, cz) = coefficients(score_matching.residual, sigma=sigma) and w = weight / (2 batch) the
    value is score_matching.denoising. Returns (float32 scalar, gradient of s's dtype).
    """
    module = _accept([s], ["s"], backend)
    rows = _rows(coef, (3,), len(s), 0, s)
    table, gradient = _table(coef, (rows, 3), s), _empty_like(s)
    counter = _counter(seed, sample, index(step), tag)  # rows are samples, never steps
    total = _squares(module, gradient, [_dense(s)], table, True, s, counter)
    w = _float64(table[:, 2])
    if _tensor(total) and not _tensor(w):
        w = total.new_tensor(w)
    return _float32((w * total).sum()), gradient


def apply(op, *operands, clip=None, seed=0, sample=0, step=0, tag=0, out=None, backend="auto",
          **parameters):
    """A step of the reference, fused: its name in OPS or the function, operands without z.

    parameters: the step's own, floats, or arrays (batch,) for one a sample. clip: (lo, hi) for
    a row with a denoise stage.

    Example: apply("perturb", x0, a=a, sigma=sigma, seed=0, step=iteration, tag=PERTURBATION)
    """
    op = lookup(op)
    if len(operands) != len(op.operands):
        raise TypeError(f"{op.name} takes {', '.join(op.operands) or 'no operand'}, "
                        f"got {len(operands)} operands")
    coef, clip = op.coefficients(clip, **parameters)
    return update(operands, coef, clip=clip, seed=seed, sample=sample, step=step, tag=tag, out=out,
                  backend=backend, names=op.operands)


class Fused:
    """The `op` of minidiff.sample's loops on a backend: a step's coefficients once a schedule,
    then one fused update a step.

    k may be a 0-d int64 tensor on the device: then nothing waits for it, and a step captured in
    a CUDA graph replays the whole schedule. The loop adds 1 to it after the step.

    Example: *_, x = reverse_sde(score, x, VP(), times, Fused(seed=0))
    """

    def __init__(self, seed=0, sample=0, backend="auto"):
        self.seed, self.sample, self.backend = seed, sample, backend

    def __call__(self, step, tag, denoise=None, clip=None, **parameters):
        op = lookup(step, denoise)
        table, clips = op.coefficients(clip, **parameters)

        def move(k, *u):
            nonlocal table, clips
            if _device(u[0]) == "cuda":  # one upload a schedule
                table, clips = (v if v is None or _tensor(v) else _table(v, v.shape, u[0])
                                for v in (table, clips))
            row = slice(None) if table.ndim == 1 or _tensor(k) else k
            return update(u, table[row], clip=None if clips is None else clips[row],
                          seed=self.seed, sample=self.sample, step=k, tag=tag,
                          backend=self.backend, names=op.operands)
        return move

    def correct(self, step, rule, x, s, k, tag):
        """step(x, s, z, eps) with eps = rule(|z_b|, |s_b|), one a sample, kept on the device."""
        draw = dict(seed=self.seed, sample=self.sample, step=index(k), tag=tag,
                    backend=self.backend)  # rows are samples, never steps
        eps = rule(_float64(noise_norms(x, **draw)), _float64(norms(s, backend=self.backend)))
        rows = [step(*unit, eps=eps) + 0 * eps for unit in np.eye(3).tolist()]
        stack = import_module("torch").stack if _tensor(eps) else np.stack
        return update([x, s], stack(rows, -1), names=("x", "s"), **draw)
