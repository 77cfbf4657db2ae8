"""An update from its coefficients, once or again and again; a step by its name."""

import numpy as np

from ..noise import PREDICTOR, PRIOR, integer, sizes
from .arguments import (
    FLOATS,
    HOLDS,
    NAMES,
    Rows,
    accept_update,
    is_dense,
    listed,
    noise_step,
    not_compiled,
    place,
    rows_of,
    tell_autograd,
)
from .launch import launched
from .table import lookup, seen


@not_compiled
def update(operands, coef, *, seed=0, sample=0, step=0, tag=PREDICTOR, first_step=0,
           rows=None, out=None, backend="auto", names=NAMES):
    """out = ((c0*u0 + c1*u1) + ...) + cz*z in float32, rounded once to the operands' dtype.

    operands: a list of K arrays, none (then `out` gives the shape) to four, of one shape,
      dtype (float32, bfloat16, float16) and device; the first axis is the samples.
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

    Example:
        >>> import numpy as np
        >>> x = np.ones((2, 3), np.float32)
        >>> print(update([x, x], [2., .5]))  # no noise
        [[2.5 2.5 2.5]
         [2.5 2.5 2.5]]
        >>> z = update([x], [0., 1.], seed=7)  # the noise alone
        >>> print((update([x], [1., .1], seed=7) == x + np.float32(.1) * z).all())
        True
    """
    run, step, result, _ = _looked_at(
        operands, coef, seed=seed, sample=sample, step=step, tag=tag, first_step=first_step,
        rows=rows, out=out, backend=backend, names=names)
    run(step)
    tell_autograd(out)
    return result


def _looked_at(operands, coef, *, seed, sample, step, tag, first_step, rows, out, backend,
               names):
    """(run, step, result, operands and result as tensors) of an update."""
    operands = listed(operands)
    first_step = integer("first_step", first_step)
    prepare, inputs, target, result = accept_update(operands, out, names, backend)
    step = noise_step(step, target, rows, first_step)
    if not isinstance(coef, Rows):
        k = len(inputs)
        coef = rows_of(coef, k, HOLDS[k], target, rows, step)
    counter = seed, sample, tag, first_step
    run = launched(prepare, target, inputs, coef, counter)
    return run, step, result, [*inputs, target]


@not_compiled
def bind(operands, coef, *, seed=0, sample=0, step=0, tag=PREDICTOR, first_step=0,
         rows=None, out=None, backend="auto", names=NAMES):
    """f(step): this `update` on these very arrays, its arguments checked once; f returns
    out.

    For loops whose buffers stay: a call on the host costs about a microsecond. coef is
    copied; one thread at a time may call f. It takes a number, or a counter where `step`
    was one. All arguments are those of `update`. ValueError for arrays that are not dense.

    Example:
        >>> import numpy as np
        >>> x = np.ones((2, 3), np.float32)
        >>> halve = bind([x], [.5], out=x)
        >>> for k in range(3):
        ...     x = halve(k)
        >>> print(x[0])
        [0.125 0.125 0.125]
    """
    operands = listed(operands)
    if hasattr(coef, "data_ptr"):
        coef = coef.clone()
    run, first, result, tensors = _looked_at(
        operands, coef, seed=seed, sample=sample, step=step, tag=tag, first_step=first_step,
        rows=rows, out=out, backend=backend, names=names)
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


@not_compiled
def normal(shape, dtype="float32", device=None, *, seed=0, sample=0, step=0, tag=PRIOR,
           out=None, backend="auto"):
    """z ~ N(0, I): an array of `shape`, NumPy, or a torch tensor where `device` is given.

    shape: its first axis the samples. dtype: float32, float16 or, with a device, bfloat16:
    a name, or NumPy's or torch's. device: cpu or cuda. seed, sample, step, backend: as in
    `update`. tag: PRIOR's, so that no op, which has another, draws the same again. out:
    filled if given.

    Example:
        >>> z = normal((4, 2), seed=1)
        >>> rows = normal((2, 2), seed=1, sample=2)  # the last two, in a batch of their own
        >>> print((rows == z[2:]).all())
        True
    """
    shape = sizes(shape)
    if out is None:
        out = _empty(shape, dtype, device)
    elif tuple(out.shape) != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, not {shape}")
    return update([], [1.], seed=seed, sample=sample, step=step, tag=tag, out=out,
                  backend=backend)


def _empty(shape, dtype, device):
    """An array, or a tensor where a device is given. TypeError, ValueError."""
    name = getattr(dtype, "__name__", None) or str(dtype).removeprefix("torch.")
    if name not in FLOATS:
        raise TypeError(f"dtype must be one of {', '.join(FLOATS)}, got {name}")
    if device is None:
        if name == "bfloat16":
            raise TypeError("dtype bfloat16 is torch's alone: name a device")
        return np.empty(shape, name)
    import torch
    return torch.empty(shape, dtype=getattr(torch, name), device=place(device))


@not_compiled
def apply(op, *operands, clip=None, seed=0, sample=0, step=0, tag=None, out=None,
          backend="auto", **parameters):
    """A step of the reference, fused: its name in OPS or the function, operands without z.

    parameters: the step's own, numbers, or arrays (batch,) for one a sample, whatever
    `step` is; the page of this folder lists those of each row, help(OPS[op].step) explains
    them. clip: (lo, hi) for a row with a denoise stage. tag: by default what the op draws
    for, `Op.tag`. seed, sample, step, out, backend: as in `update`.

    Example:
        >>> import numpy as np
        >>> x0 = np.zeros((2, 3), np.float32)
        >>> x = apply("perturb", x0, a=.5, sigma=np.array([1., 2.]), seed=0)
        >>> print((apply("perturb", x0, a=.5, sigma=2., seed=0)[1] == x[1]).all())
        True
    """
    op = lookup(op)
    op.require(operands)
    try:
        rows = seen(op, clip, parameters)
    except TypeError as e:
        raise TypeError(f"apply({op.name!r}): {e}") from None
    return update(operands, rows, rows="sample", names=op.operands,
                  seed=seed, sample=sample, step=step, tag=op.tag if tag is None else tag,
                  out=out, backend=backend)
