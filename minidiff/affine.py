"""The one idea: a step is affine in its operands, so it tells its own coefficients.

A step is a function whose operands are positional-only and come first, noise `z` last:

    def langevin_step(x, s, z, /, eps):
        return x + eps / 2 * s + eps**.5 * z

It only adds and subtracts its operands, times or over parameters. So x' = a x + b s + c z:

    a = step(1, 0, 0),  b = step(0, 1, 0),  c = step(0, 0, 1)            in float64.

So an equation is written once, as its paper prints it. No coefficient is derived by hand,
and one kernel that computes a x + b s + c z runs every sampler. Next: `kernels`.
"""

from inspect import signature
from weakref import WeakKeyDictionary

import numpy as np

from .arguments import check_domain

_SIGNATURES = WeakKeyDictionary()  # it keeps no step alive, nor what a step holds


def _signature(step):
    """(names of the operands, of all parameters, of those without a default) of a step."""
    if step not in _SIGNATURES:
        parameters = [p for p in signature(step).parameters.values()
                      if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        first = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_ONLY)
        needed = tuple(p.name for p in parameters if p.default is p.empty)
        _SIGNATURES[step] = first, tuple(p.name for p in parameters), needed
    return _SIGNATURES[step]


def operands(step):
    """The names of a step's operands: its positional-only parameters."""
    return _signature(step)[0]


def require_parameters(stages, parameters):
    """TypeError where a parameter is of none of these functions, or one of theirs is not
    there. Both messages say what they take."""
    name = stages[0].__name__
    takes = []
    needs = []
    for f in stages:
        first, every, without_default = _signature(f)
        takes += [p for p in every if p not in (*first, *takes)]
        needs += [p for p in without_default if p not in (*first, *needs)]
    for p in parameters:
        if p not in takes:
            raise TypeError(f"{name} has no parameter {p!r}: it takes "
                            f"{', '.join(takes) or 'none'}")
    missing = [p for p in needs if p not in parameters]
    if missing:
        raise TypeError(f"{name} needs {', '.join(missing)}")


def order(p):
    """A decorator: the step converges at order p in its step size; step.order says so."""
    def mark(step):
        step.order = p
        return step
    return mark


@np.errstate(all="ignore")  # what is not finite is refused
def coefficients(step, **parameters):
    """A step's coefficients: the step at the unit vectors, in float64.

    parameters: the step's own, floats or arrays, (B,) for one a sample or (N,) for a
    schedule. Returns float64 [..., operands] in the order of the step's operands, z's last.
    TypeError for a parameter that it does not take, or that is missing. ValueError for one
    outside its range, for a coefficient that is not finite, and for a step that is not
    linear.

    Example:
        >>> from minidiff.langevin import langevin_step
        >>> print(coefficients(langevin_step, eps=.01))
        [1.    0.005 0.1  ]
    """
    name = step.__name__
    n = len(operands(step))
    if not n:
        raise TypeError(f"{name} has no operands: they come first, and a / after them")
    require_parameters([step], parameters)
    parameters = check_domain(**parameters)
    rows = [step(*unit, **parameters) for unit in np.eye(n).tolist()]
    table = np.stack(np.broadcast_arrays(*rows), -1)
    if np.iscomplexobj(table) or not np.isfinite(table).all():
        raise ValueError(f"{name}: a coefficient is not finite at these parameters")
    point = np.arange(2., n + 2)
    error = abs(step(*point.tolist(), **parameters) - table @ point)
    if (error > 1e-9 * abs(table) @ point).any():
        raise ValueError(f"{name} is not linear in its operands")
    return table.astype(np.float64)


def accepted_by(f, parameters):
    """Those of the parameters that f takes."""
    return {name: parameters[name] for name in _signature(f)[1] if name in parameters}


def coefficient_row(step, denoise=None, clip=None, **parameters):
    """A step's coefficients as a kernel takes them: c0, c1, ..., cz.

    A step whose second operand is denoise(x, s), clipped to clip = (lo, hi), has four more:
    p0 and p1, the coefficients of denoise, then lo and hi. clip=None sets no bounds.
    TypeError for a parameter that neither takes, or that is missing. ValueError for a clip
    that is not (lo, hi) or has no denoise beside it, and as in `coefficients`.
    """
    name = step.__name__
    stages = [step, denoise] if denoise else [step]
    require_parameters(stages, parameters)
    parts = [coefficients(f, **accepted_by(f, parameters)) for f in stages]
    if clip is not None and not denoise:
        raise ValueError(f"{name} has no denoise stage to clip")
    if clip is not None and (np.shape(clip) != (2,) or not clip[0] <= clip[1]):
        raise ValueError(f"clip must be (lo, hi) with lo <= hi, got {clip}")
    if denoise:
        bounds = (-np.inf, np.inf) if clip is None else clip
        parts.append(np.array(bounds, np.float64))
    rows = np.broadcast_shapes(*(p.shape[:-1] for p in parts))
    parts = [np.broadcast_to(p, (*rows, p.shape[-1]))
             for p in parts]
    return np.concatenate(parts, -1)
