"""An update from its coefficients, once or again and again; a step by its name."""

from operator import index

import numpy as np

from ..noise import PREDICTOR, PRIOR
from .arguments import (
    FLOATS,
    HOLDS,
    NAMES,
    Rows,
    accept_update,
    is_dense,
    noise_step,
    rows_of,
    tell_autograd,
)
from .launch import launched
from .table import lookup, seen


def update(operands, coef, **keywords):
    """out = ((c0*u0 + c1*u1) + ...) + cz*z in float32, rounded once to the operands' dtype.

    operands: none (then `out` gives the shape) to four arrays of one shape, dtype (float32,
      bfloat16, float16) and device; the first axis is the samples.
    coef: (K,), or (K + 1,) where the last multiplies the noise; with four more, p0, p1, lo,
      hi, u1 first becomes min(max(p0*u0 + p1*u1, lo), hi). (batch, ...) for one row a
      sample.
    seed, sample, step, tag: the noise's counter (minidiff.noise). seed and sample are
      numbers, sample the first row's id, or arrays with an integer a row. step is a number
      or a step counter, a 0-d int64 array or tensor that a GPU reads when it comes to it:
      nothing waits. first_step, a number, is added to it for the noise.
    rows: what the rows of coef are. "sample": one a sample. "step": a table (N, ...) of
      which step chooses one, clamped to 0 ... N - 1. Beside a counter it must be said.
    out: where to write; may be an operand itself (in place), may not overlap one otherwise.
    backend: "auto" or a name; names: the operands', for messages.
    Returns out. TypeError, ValueError and RuntimeError say which argument and why.
    """
    run, step, result, _ = _looked_at(operands, coef, **keywords)
    run(step)
    tell_autograd(keywords.get("out"))
    return result


def _looked_at(operands, coef, *, seed=0, sample=0, step=0, tag=PREDICTOR, first_step=0,
               rows=None, out=None, backend="auto", names=NAMES):
    """(run, step, result, operands and result as tensors) of an update."""
    operands = [*operands]
    first_step = index(first_step)
    prepare, inputs, target, result = accept_update(operands, out, names, backend)
    step = noise_step(step, target, rows, first_step)
    if not isinstance(coef, Rows):
        k = len(inputs)
        coef = rows_of(coef, k, HOLDS[k], target, rows, step)
    counter = seed, sample, tag, first_step
    run = launched(prepare, target, inputs, coef, counter)
    return run, step, result, [*inputs, target]


def bind(operands, coef, *, rows=None, names=NAMES, first_step=0, **keywords):
    """f(step): this `update` on these very arrays, its arguments checked once; f returns
    out.

    For loops whose buffers stay: a call on the host costs about a microsecond. coef is
    copied; one thread at a time may call f. It takes a number, or a counter where `step`
    was one. ValueError for arrays that are not dense.
    """
    operands = [*operands]
    if hasattr(coef, "data_ptr"):
        coef = coef.clone()
    run, first, result, tensors = _looked_at(operands, coef, rows=rows, names=names,
                                             first_step=first_step, **keywords)
    for name, u, t in zip(names, operands, tensors):
        if not is_dense(u, t):
            raise ValueError(f"{name} must be contiguous and writeable to be bound")

    def again(step):
        step = noise_step(step, tensors[-1], rows, first_step)
        if isinstance(step, int) != isinstance(first, int):
            raise ValueError(
                "bound with a number for its step, f takes numbers; with a counter, "
                "counters")
        run(step)
        tell_autograd(result)
        return result
    return again


def normal(shape, dtype="float32", device=None, *, tag=PRIOR, out=None, **kw):
    """z ~ N(0, I): an array of `shape`, NumPy, or a torch tensor where `device` is given.

    Keywords as in `update`: seed, sample, step, tag, backend; `out` is filled if given. The
    tag is PRIOR's, so that no op, which has another, draws the same again.
    """
    if out is not None:
        if tuple(out.shape) != tuple(shape):
            raise ValueError(f"out has shape {tuple(out.shape)}, not {tuple(shape)}")
    elif device is None:
        out = np.empty(shape, dtype)
    else:
        import torch
        if dtype not in FLOATS:
            raise TypeError(f"dtype must be one of {', '.join(FLOATS)}, got {dtype}")
        out = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    return update([], [1.], tag=tag, out=out, **kw)


def apply(op, *operands, clip=None, seed=0, sample=0, step=0, tag=None, out=None,
          backend="auto", **parameters):
    """A step of the reference, fused: its name in OPS or the function, operands without z.

    parameters: the step's own, numbers, or arrays (batch,) for one a sample, whatever
    `step` is. clip: (lo, hi) for a row with a denoise stage. tag: by default what the op
    draws for, `Op.tag`. seed, sample, step, out, backend: as in `update`.

    Example: apply("perturb", x0, a=a, sigma=sigma, seed=0, step=iteration)
    """
    op = lookup(op)
    op.require(operands)
    return update(operands, seen(op, clip, parameters), rows="sample", names=op.operands,
                  seed=seed, sample=sample, step=step, tag=op.tag if tag is None else tag,
                  out=out, backend=backend)
