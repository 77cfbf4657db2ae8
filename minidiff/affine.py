"""The one idea: a step is affine in its operands, so the step itself tells its coefficients.

A step is a function whose operands are positional-only and come first, noise `z` last:

    def langevin_step(x, s, z, /, eps): return x + eps / 2 * s + eps ** 0.5 * z

Operands meet only + - * / and parameters, so x' = a x + b s + c z with

    a = step(1, 0, 0),  b = step(0, 1, 0),  c = step(0, 0, 1)            in float64.
"""

from functools import cache
from inspect import signature

import numpy as np

_INF = float("inf")
SLACK = 2.**-20  # of a range, still rounding: EDM's rule in float32 misses its ends by 11 * 2^-24
WHOLE = "n", "i", "n_steps", "n_corrector"
# parameter -> lowest, highest, whether each end is allowed
DOMAIN = dict.fromkeys(("eps", "sigma", "sigma_next", "sigma_prev", "sigma_max", "dt", "a", "snr",
                        "rho", "rtol", "atol", "t_min"), (0, _INF, False, False)) | {
    "u": (0, 1, True, True), "eta": (0, 1, True, True), "variance": (0, _INF, True, False),
    "n": (1, _INF, True, False), "n_steps": (1, _INF, True, False),
    "n_corrector": (0, _INF, True, False), "beta": (0, 1, False, False),
    "alpha_bar": (0, 1, False, False), "alpha_bar_prev": (0, 1, False, True)}


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


def check_range(below=_INF, n=2, least=1, **ends):
    """(low, high), the two that are named, in float64. ValueError unless n >= least is whole and
    0 < low <= high < below."""
    low, high = (float(_wide(name, v)) for name, v in ends.items())
    if not isinstance(n, (int, np.integer)) or n < least or not 0 < low <= high < below:
        ends_rise = f"0 < {' <= '.join(ends)} < {below:g}"
        raise ValueError(f"need a whole n >= {least} and {ends_rise}, got {n=}, {ends}")
    return low, high


def like(x, u, name="score"):
    """u, an array or tensor; ValueError unless its shape is x's: it would broadcast."""
    shape, of_x = (tuple(getattr(v, "shape", ())) for v in (u, x))
    if shape != of_x:
        raise ValueError(f"{name} has shape {shape}, not {of_x}")
    return u


def schedule(values, name):
    """values in float64, (N,), N > 0 finite numbers, or ValueError."""
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite, (N,) with N > 0, got shape {values.shape}")
    return values


def _wide(name, v):
    """A parameter in float64 or int64: in fewer bits a formula would lose digits, or wrap."""
    if hasattr(v, "data_ptr") or isinstance(v, (list, tuple, str)):
        raise TypeError(f"{name} must be a number or a NumPy array, got a {type(v).__name__}")
    kind = v.dtype.kind if isinstance(v, (np.generic, np.ndarray)) else ""
    if kind not in tuple("fiu"):
        return v
    if v.dtype == np.float64:
        return v[()]
    if v.ndim:
        return v.astype(np.float64 if kind == "f" else np.int64)
    return float(v) if kind == "f" else int(v)


def _shown(v):
    """A number in few digits, or in all where they tell it from its neighbours."""
    return f"{v:g}" if float(f"{v:g}") == v else repr(float(v))


def _inside(name, v, low, high, low_in, high_in):
    """v within its range, on a closed end that it misses by rounding alone; else ValueError."""
    a = np.asarray(v, np.float64)
    whole = name in WHOLE
    slack = 0. if whole or high == _INF else SLACK * (high - low)
    above = a >= low - slack if low_in else a > low
    below = a <= high + slack if high_in else a < high
    good = above & below
    if not good.all():
        raise ValueError(f"{name} must be in {'[' if low_in else '('}{low:g}, {high:g}"
                         f"{']' if high_in else ')'}, got {_shown(a[~good].flat[0])}")
    if whole and np.asarray(v).dtype.kind not in "iu":
        raise ValueError(f"{name} must be a whole number, an int, got {v}")
    if not slack or ((low <= a) & (a <= high)).all():
        return v
    return np.clip(a, low, high) if a.ndim else min(max(float(a), low), high)


def check_domain(**parameters):
    """The parameters in float64, as a step computes with them. ValueError names the first that is
    NaN, outside its range or not whole.

    `t` is held to [0, T] of the `sde` beside it, `i` to 0 ... n-1; other names as DOMAIN says.
    What misses a closed end by rounding alone, SLACK of the range, is put on it.
    """
    domain = DOMAIN | {"t": (0, getattr(parameters.get("sde"), "T", _INF), True, True),
                       "i": (0, parameters.get("n", _INF) - 1, True, True)}
    parameters = {name: _wide(name, v) for name, v in parameters.items()}
    for name, v in parameters.items():
        if name in domain:
            parameters[name] = _inside(name, v, *domain[name])
    for low, high in (("sigma_next", "sigma"), ("sigma", "sigma_prev"),
                      ("alpha_bar", "alpha_bar_prev")):
        if low in parameters and high in parameters and not (
                np.asarray(parameters[low]) < np.asarray(parameters[high])).all():
            raise ValueError(f"{low} must be smaller than {high}")
    return parameters


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


def own(f, parameters):
    """Those of the parameters that f takes."""
    return {n: parameters[n] for n in _names(f) if n in parameters}


def row(step, denoise=None, clip=None, **parameters):
    """`coefficients` of a step, c0, c1, ..., cz; of one whose second operand is denoise(x, s)
    clipped to clip = (lo, hi), None for no bounds, also p0, p1, lo, hi with p of the denoise."""
    name, stages = step.__name__, [f for f in (step, denoise) if f]
    unknown = set(parameters).difference(*(own(f, parameters) for f in stages))
    if unknown:
        raise TypeError(f"{name} has no parameter {sorted(unknown)[0]!r}")
    parts = [coefficients(f, **own(f, parameters)) for f in stages]
    if clip is not None and not denoise:
        raise ValueError(f"{name} has no denoise stage to clip")
    if clip is not None and (np.shape(clip) != (2,) or not clip[0] <= clip[1]):
        raise ValueError(f"clip must be (lo, hi) with lo <= hi, got {clip}")
    if denoise:
        parts.append(np.array((-_INF, _INF) if clip is None else clip, np.float64))
    rows = np.broadcast_shapes(*(p.shape[:-1] for p in parts))
    return np.concatenate([np.broadcast_to(p, (*rows, p.shape[-1])) for p in parts], -1)
