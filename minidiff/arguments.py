"""What a caller may pass: parameters within their range, arrays of one shape, in float64.

Each check raises one line that names the argument. Schedules and loops call the checks
before they compute; an equation never does, so that it reads as it is printed. Next:
`affine`, which calls equations with numbers that were checked.
"""

import numpy as np

_INF = float("inf")
# of a range, still rounding: EDM's rule in float32 misses its ends by 11 * 2^-24
SLACK = 2.**-20
WHOLE = "n", "i", "n_steps", "n_corrector"
POSITIVE = ("eps", "sigma", "sigma_next", "sigma_prev", "sigma_max", "sigma_data", "dt",
            "a", "snr", "rho", "rtol", "atol", "t_min")
# parameter -> lowest, highest, whether each end is allowed
DOMAIN = dict.fromkeys(POSITIVE, (0, _INF, False, False)) | {
    "u": (0, 1, True, True),
    "eta": (0, 1, True, True),
    "w": (-_INF, _INF, False, False),
    "variance": (0, _INF, True, False),
    "noise_std": (0, _INF, True, False),
    "s_churn": (0, _INF, True, False),
    "s_noise": (0, _INF, False, False),
    "n": (1, _INF, True, False),
    "n_steps": (1, _INF, True, False),
    "n_corrector": (0, _INF, True, False),
    "beta": (0, 1, False, False),
    "alpha_bar": (0, 1, False, False),
    "alpha_bar_prev": (0, 1, False, True),
}
# in one call, the first must be smaller than the second
ORDERED = (
    ("sigma_next", "sigma"),
    ("sigma", "sigma_prev"),
    ("alpha_bar", "alpha_bar_prev"),
)


def check_range(below=_INF, n=2, least=1, **ends):
    """(low, high) in float64, the two ends that are named, the lower first.

    ValueError unless 0 < low <= high < below and n is a whole number of at least `least`.
    """
    low, high = (float(_widened(name, v)) for name, v in ends.items())
    whole = isinstance(n, (int, np.integer))
    if not whole or n < least or not 0 < low <= high < below:
        ends_rise = f"0 < {' <= '.join(ends)} < {below:g}"
        raise ValueError(f"need a whole n >= {least} and {ends_rise}, got {n=}, {ends}")
    return low, high


def require_shape(x, u, name="score"):
    """u, an array or tensor. ValueError unless its shape is x's, as it would broadcast."""
    shape = tuple(getattr(u, "shape", ()))
    wanted = tuple(getattr(x, "shape", ()))
    if shape != wanted:
        raise ValueError(f"{name} has shape {shape}, not {wanted}")
    return u


def schedule(values, name):
    """values in float64, (N,). ValueError unless they are N > 0 finite numbers."""
    require_plain(name, values)
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite, (N,) with N > 0, "
                         f"got shape {values.shape}")
    return values


def check_falling(levels, name="sigmas"):
    """levels in float64, (L,). ValueError unless they are positive and fall."""
    levels = schedule(levels, name)
    if not (np.diff(levels, append=0.) < 0).all():
        raise ValueError(f"{name} must be positive and fall from level to level")
    return levels


def require_plain(name, u):
    """TypeError for what says more than its numbers, which would be lost: a mask, units."""
    if isinstance(u, np.ndarray) and type(u) not in (np.ndarray, np.memmap):
        raise TypeError(f"{name} must be a plain NumPy array, got a {type(u).__name__}, of "
                        "which more than the numbers would be lost: pass np.asarray of it, "
                        "or .filled() of a masked one")


def _widened(name, v):
    """A parameter in float64 or int64: in fewer bits a formula would lose digits, or wrap.

    TypeError for a tensor, a list, a string or a masked array; where `name` is known to be
    a number, for all else that is none.
    """
    require_plain(name, v)
    if name == "sde" and (v is None or isinstance(v, (int, float, np.ndarray))):
        raise TypeError(f"sde must be a process, such as sde.VP(), got {v!r}")
    is_number = isinstance(v, (int, float, np.generic, np.ndarray))
    is_other = isinstance(v, (list, tuple, str)) or hasattr(v, "data_ptr")
    if is_other or name in DOMAIN and not is_number:
        raise TypeError(f"{name} must be a number or a NumPy array, "
                        f"got a {type(v).__name__}")
    if isinstance(v, int) and abs(v) >= 1 << 1023:
        raise ValueError(f"{name} is beyond float64")
    if not isinstance(v, (np.generic, np.ndarray)):
        return v
    kind = v.dtype.kind
    if kind not in "fiu":
        return v
    if v.dtype == np.float64:
        return v[()]
    if v.ndim:
        return v.astype(np.float64 if kind == "f" else np.int64)
    return float(v) if kind == "f" else int(v)


def _shown(v):
    """A number in few digits, or in all where few would print another number."""
    short = f"{v:g}"
    return short if float(short) == v else repr(float(v))


def _within(name, v, low, high, low_in, high_in):
    """v within its range, or ValueError.

    low_in, high_in: whether that end is allowed. What misses a closed end by rounding alone
    is put on it.
    """
    a = np.asarray(v, np.float64)
    whole = name in WHOLE
    slack = 0. if whole or high == _INF else SLACK * (high - low)
    above = a >= low - slack if low_in else a > low
    below = a <= high + slack if high_in else a < high
    good = above & below
    if not good.all():
        left = "[" if low_in else "("
        right = "]" if high_in else ")"
        raise ValueError(f"{name} must be in {left}{low:g}, {high:g}{right}, "
                         f"got {_shown(a[~good].flat[0])}")
    if whole and np.asarray(v).dtype.kind not in "iu":
        raise ValueError(f"{name} must be a whole number, an int, got {v}")
    if not slack or ((low <= a) & (a <= high)).all():
        return v
    v = np.clip(a, low, high)
    return v if a.ndim else float(v)


def check_domain(**parameters):
    """The parameters in float64, as a step computes with them.

    `t` is held to [0, T] of the `sde` beside it, `i` to 0 ... n-1, other names as DOMAIN
    says. What misses a closed end by rounding alone, SLACK of the range, is put on it.
    ValueError names the first parameter that is NaN, outside its range, not whole or not
    smaller than another, as ORDERED says.
    """
    parameters = {name: _widened(name, v) for name, v in parameters.items()}
    domain = DOMAIN | {
        "t": (0, getattr(parameters.get("sde"), "T", _INF), True, True),
        "i": (0, parameters.get("n", _INF) - 1, True, True),
    }
    for name, v in parameters.items():
        if name in domain:
            parameters[name] = _within(name, v, *domain[name])
    for low, high in ORDERED:
        if low in parameters and high in parameters:
            smaller = np.asarray(parameters[low]) < np.asarray(parameters[high])
            if not smaller.all():
                raise ValueError(f"{low} must be smaller than {high}")
    return parameters
