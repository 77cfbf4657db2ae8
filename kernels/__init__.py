"""Fused kernels: one update with its noise drawn inside, the same bits on every backend.

    out = ((c0*u0 + c1*u1) + c2*u2 ...) + cz*z,   z = noise.normal(..., seed, sample, step, tag)

`update` takes coefficients, `apply` a step of the reference and its parameters, `Fused` runs
whole sampling loops. Backends: numpy (the float32 oracle), torch, host (CPU, compiled),
triton, cupy; `auto` picks by device.

Example: apply("langevin", x, s, eps=1e-3, seed=0, step=7)
"""

from importlib import import_module

import numpy as np

from ..affine import coefficients
from .table import OPS, Op, lookup

__all__ = ["BACKENDS", "OPS", "Fused", "Op", "apply", "backend", "coefficients", "missing",
           "normal", "update"]
BACKENDS = "numpy", "torch", "host", "triton", "cupy"
FLOATS = "float32", "bfloat16", "float16"


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
        cuda = getattr(getattr(array, "device", None), "type", "cpu") == "cuda"
        order = ("triton", "cupy", "torch") if cuda else ("host", "numpy") \
            if isinstance(array, np.ndarray) else ("host", "torch")
        name = next(n for n in order if not missing(n))
    reason = missing(name)
    if reason:
        raise RuntimeError(f"backend {name!r}: {reason}")
    return _module(name)


def _dtype(array):
    return str(array.dtype).removeprefix("torch.")


def _address(array):
    return array.data_ptr() if hasattr(array, "data_ptr") else array.ctypes.data


def _contiguous(array):
    return array.is_contiguous() if hasattr(array, "data_ptr") else array.flags.c_contiguous


def _overlap(out, u):
    """Whether two contiguous arrays share some, but not all, of their bytes."""
    start, other = _address(out), _address(u)
    size = out.nbytes
    return start != other and start < other + size and other < start + size


def _validate(arrays, names):
    """One kind, dtype, shape and device for all, or one clear line."""
    first = arrays[0]
    for name, u in zip(names, arrays):
        if not (isinstance(u, np.ndarray) or hasattr(u, "data_ptr")):
            raise TypeError(f"{name} must be a NumPy array or a torch tensor, "
                            f"got {type(u).__name__}")
        if _dtype(u) not in FLOATS:
            raise TypeError(f"{name} must be one of {', '.join(FLOATS)}, got {_dtype(u)}")
        if isinstance(u, np.ndarray) != isinstance(first, np.ndarray):
            raise TypeError(f"{name} is a {type(u).__name__}, {names[0]} a "
                            f"{type(first).__name__}")
        if u.dtype != first.dtype:
            raise TypeError(f"{name} is {_dtype(u)}, {names[0]} is {_dtype(first)}")
        if u.shape != first.shape:
            raise ValueError(f"{name} has shape {tuple(u.shape)}, {names[0]} "
                             f"{tuple(first.shape)}")
        if not u.ndim:
            raise ValueError(f"{name} needs a first axis, the samples")
        if str(getattr(u, "device", "")) != str(getattr(first, "device", "")):
            raise ValueError(f"{name} is on {u.device}, {names[0]} on {first.device}")
        if getattr(u, "requires_grad", False):
            raise RuntimeError(f"{name} requires grad and this update records none: "
                               "pass it detached")


def _table(array, rows_of, where):
    """Coefficients as contiguous float32 beside `where`: NumPy on the CPU, else its device."""
    if hasattr(array, "data_ptr") and getattr(where, "is_cuda", False):
        return array.float().contiguous().reshape(rows_of)
    host = array.detach().cpu().numpy() if hasattr(array, "data_ptr") else np.asarray(array)
    host = np.ascontiguousarray(host.reshape(rows_of), np.float32)
    if not getattr(where, "is_cuda", False):
        return host
    from torch import from_numpy
    return from_numpy(host).to(where.device)


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
    _validate(operands + ([] if out is None else [out]), names + ["out"])
    first = operands[0] if operands else out
    module = globals()["backend"](backend, first)
    reason = module.refuses(first)
    if reason:
        raise ValueError(f"backend {module.NAME!r} {reason}")
    batch = first.shape[0]
    size = int(np.prod(first.shape[1:], dtype=np.int64))

    width, counted = np.shape(coef)[-1] if np.ndim(coef) else 0, np.ndim(step) == 0 and (
        isinstance(step, np.ndarray) or hasattr(step, "data_ptr"))
    if width - len(operands) not in (0, 1) or width == 0:
        raise ValueError(f"coef has shape {tuple(np.shape(coef))}: its last axis must be "
                         f"{len(operands)} coefficients, or one more for the noise")
    if np.ndim(coef) > 2 or (np.ndim(coef) == 2 and not counted and len(coef) != batch):
        raise ValueError(f"coef has shape {tuple(np.shape(coef))}: one row a sample needs "
                         f"{batch} rows for {names[0]} of shape {tuple(first.shape)}")
    rows = np.shape(coef)[0] if np.ndim(coef) == 2 else 1
    if counted and (_dtype(step) != "int64" or np.ndim(coef) != 2
                    or str(getattr(step, "device", "cpu")) != str(getattr(first, "device", "cpu"))):
        raise ValueError("a step counter must be int64, on the operands' device, with a coef "
                         "table of shape (N, K) or (N, K + 1)")
    if clip is not None:
        if len(operands) < 2:
            raise ValueError("clip needs two operands, x and s")
        clip = np.broadcast_to(np.asarray(clip, np.float32), (rows, 4))
        coef = np.concatenate((np.reshape(coef, (rows, width)), clip), 1)
    table = _table(coef, (rows, np.shape(coef)[-1]), first)

    operands = [u if _contiguous(u) else module.contiguous(u) for u in operands]
    if out is None:
        out = module.empty_like(first)
    elif not _contiguous(out):
        raise ValueError("out must be contiguous")
    for name, u in zip(names, operands):
        if _overlap(out, u):
            raise ValueError(f"out overlaps {name} in part: pass that array itself or a new one")
    if batch and size:
        module.update(out, operands, table, width > len(operands), clip is not None,
                      (batch, size), seed, sample, step, tag)
    return out


def normal(shape, dtype="float32", device=None, *, out=None, **kw):
    """z ~ N(0, I): an array of `shape`, NumPy, or a torch tensor where `device` is given.

    Keywords as in `update`: seed, sample, step, tag, backend; `out` is filled if given.
    """
    if out is None and device is None:
        out = np.empty(shape, dtype)
    elif out is None:
        import torch
        out = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    return update([], [1.], out=out, **kw)


def apply(op, *operands, seed=0, sample=0, step=0, tag=0, out=None, backend="auto",
          **parameters):
    """A step of the reference, fused: its name in OPS or the function, operands without z.

    parameters: the step's own, floats, or arrays (batch,) for one a sample.

    Example: apply("perturb", x0, a=a, sigma=sigma, seed=0, step=iteration, tag=PERTURBATION)
    """
    op = lookup(op)
    op = op if isinstance(op, Op) else Op(op.__name__, op)
    if len(operands) != len(op.operands):
        raise TypeError(f"{op.name} takes {', '.join(op.operands) or 'no operand'}, "
                        f"got {len(operands)} operands")
    return update(operands, coefficients(op.step, **parameters), seed=seed, sample=sample,
                  step=step, tag=tag, out=out, backend=backend, names=op.operands)


class Fused:
    """The `op` of minidiff.sample's loops on a backend: a step's coefficients once a schedule,
    then one fused update a step.

    Example: *_, x = reverse_sde(score, x, VP(), times, Fused(seed=0))
    """

    def __init__(self, seed=0, sample=0, backend="auto"):
        self.seed, self.sample, self.backend = seed, sample, backend

    def __call__(self, step, tag, **parameters):
        table = coefficients(step, **parameters)
        names = Op(step.__name__, step).operands

        def move(k, *u):
            nonlocal table
            if getattr(u[0], "is_cuda", False) and isinstance(table, np.ndarray):
                table = _table(table, table.shape, u[0])  # one upload a schedule
            return update(u, table[k] if table.ndim > 1 else table, seed=self.seed,
                          sample=self.sample, step=k, tag=tag, backend=self.backend, names=names)
        return move
