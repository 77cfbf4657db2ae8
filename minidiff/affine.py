"""The one idea: a step is affine in its operands, so the step itself tells its coefficients.

A step is a function whose operands are positional-only and come first, noise `z` last:

    def langevin_step(x, s, z, /, eps): return x + eps / 2 * s + eps ** 0.5 * z

Operands meet only + - * / and parameters, so x' = a x + b s + c z with

    a = step(1, 0, 0),  b = step(0, 1, 0),  c = step(0, 0, 1)            in float64.
"""

from functools import cache
from inspect import signature

import numpy as np

from .arguments import check_domain


@cache
def operands(step):
    """The names of a step's operands: its positional-only parameters."""
    return tuple(p.name for p in signature(step).parameters.values()
                 if p.kind is p.POSITIONAL_ONLY)


def order(p):
    """Marks a step as convergent of order p in its step size: step.order."""
    def mark(step):
        step.order = p
        return step
    return mark


@np.errstate(all="ignore")  # what is not finite is refused
def coefficients(step, **parameters):
    """A step's coefficients: the step at the unit vectors, in float64.

    parameters: the step's own, floats or arrays, (B,) for one a sample or (N,) for a schedule.
    Returns float64 [..., operands] in the order of the step's arguments, z's last. ValueError
    for a parameter outside its range, a coefficient that is not finite, a step not linear.

    Example: coefficients(langevin_step, eps=0.01) -> [1, 0.005, 0.1]
    """
    parameters = check_domain(**parameters)
    n = len(operands(step))
    rows = [step(*unit, **parameters) for unit in np.eye(n).tolist()]
    table = np.stack(np.broadcast_arrays(*rows), -1)
    if np.iscomplexobj(table) or not np.isfinite(table).all():
        raise ValueError(f"{step.__name__}: a coefficient is not finite at these parameters")
    point = np.arange(2., n + 2)
    if (abs(step(*point.tolist(), **parameters) - table @ point) > 1e-9 * abs(table) @ point).any():
        raise ValueError(f"{step.__name__} is not linear in its operands")
    return table.astype(np.float64)


_names = cache(lambda f: tuple(signature(f).parameters))


def accepted_by(f, parameters):
    """Those of the parameters that f takes."""
    return {n: parameters[n] for n in _names(f) if n in parameters}


def coefficient_row(step, denoise=None, clip=None, **parameters):
    """`coefficients` of a step, c0, c1, ..., cz; of one whose second operand is denoise(x, s)
    clipped to clip = (lo, hi), None for no bounds, also p0, p1, lo, hi with p of the denoise."""
    name, stages = step.__name__, [f for f in (step, denoise) if f]
    unknown = set(parameters).difference(*(accepted_by(f, parameters) for f in stages))
    if unknown:
        raise TypeError(f"{name} has no parameter {sorted(unknown)[0]!r}")
    parts = [coefficients(f, **accepted_by(f, parameters)) for f in stages]
    if clip is not None and not denoise:
        raise ValueError(f"{name} has no denoise stage to clip")
    if clip is not None and (np.shape(clip) != (2,) or not clip[0] <= clip[1]):
        raise ValueError(f"clip must be (lo, hi) with lo <= hi, got {clip}")
    if denoise:
        parts.append(np.array((-np.inf, np.inf) if clip is None else clip, np.float64))
    rows = np.broadcast_shapes(*(p.shape[:-1] for p in parts))
    return np.concatenate([np.broadcast_to(p, (*rows, p.shape[-1])) for p in parts], -1)
