"""Data sets as arrays within [-1, 1]: handwritten digits, three 2-D sets, any .npz file."""

import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from . import noise
from .likelihood import dequantize
from .targets import Mixture

HELD_OUT = 360


@dataclass(frozen=True)
class Data:
    """A data set on the model's scale.

    train, held: (n, *shape) float32 arrays.
    levels: how many grey levels there are, or None for points.
    ends: the two numbers, in the data's own units, that became -1 and 1.
    target: the distribution that it was drawn from, where one is known.
    """

    name: str
    train: np.ndarray
    held: np.ndarray
    levels: int | None = None
    ends: tuple = (-1., 1.)
    target: Mixture | None = None

    @property
    def shape(self):
        """One sample's shape."""
        return self.train.shape[1:]

    def quantize(self, x):
        """Samples of dequantised data, rounded to the grey levels that they fall into.

        Points pass unchanged.
        """
        if not self.levels:
            return x
        k = np.floor((x + 1) * self.levels / 2)
        k = np.clip(k, 0, self.levels - 1)
        return 2 * k / (self.levels - 1) - 1

    def in_own_units(self, x):
        """Samples of the model in the units of the data.

        Returns uint8 for grey levels that fit in it, else float64.
        """
        low, high = self.ends
        x = np.asarray(x, np.float64)
        x = low + (x + 1) / 2 * (high - low)
        if self.levels and low >= 0 and high < 256:
            return np.clip(np.round(x), low, high).astype(np.uint8)
        return x


def dequantized(x, levels, seed=0, step=0):
    """What a network sees: `likelihood.dequantize` of grey levels in [-1, 1], with noise.

    Points pass unchanged.
    """
    if not levels:
        return x
    u = 1 - noise.uniform(x.shape, seed, step=step, tag=noise.DEQUANTIZATION)
    k = np.round((x + 1) * (levels - 1) / 2)
    return dequantize(k, u, levels)


@lru_cache(maxsize=2)  # an epoch's iterations share one
def permutation(n, seed, step=0):
    """A random permutation of n, a function of seed and step."""
    words = noise.words((n,), seed, step=step, tag=noise.ORDER)
    order = np.argsort(words[:, 0, 0], kind="stable")
    order.flags.writeable = False  # all who ask share it
    return order


def _uniform(shape, seed):
    return noise.uniform(shape, seed, tag=noise.DATA)


def ring():
    """Eight Gaussians of deviation .05 on a circle of radius .8."""
    angle = 2 * np.pi * np.arange(8) / 8
    means = .8 * np.stack((np.cos(angle), np.sin(angle)), 1)
    return Mixture(np.ones(8), means, .05**2)


def mixture(n, seed):
    """Points of the ring, whose score is known: (n, 2)."""
    return ring().sample(n, seed)


def moons(n, seed):
    """Two half circles, one in the other's arms, with noise: (n, 2)."""
    u = _uniform((n, 2), seed)
    z = noise.normal((n, 2), seed, tag=noise.CHOICE)
    angle = np.pi * u[:, 0]
    upper = u[:, 1] < .5
    x = np.where(upper, np.cos(angle), 1 - np.cos(angle)) - .5
    y = np.where(upper, np.sin(angle), .5 - np.sin(angle)) - .25
    points = np.stack((x, y), 1) + .05 * z
    return points * .55


def checkerboard(n, seed):
    """The eight dark squares of a four by four board on [-1, 1]^2: (n, 2)."""
    u = _uniform((n, 3), seed)
    square = np.minimum((8 * u[:, 2]).astype(int), 7)
    row = square // 2
    column = 2 * (square % 2) + row % 2
    corner = np.stack((column, row), 1)
    return (corner + u[:, :2]) / 2 - 1


def digits():
    """scikit-learn's 1,797 handwritten digits, 8 by 8, 17 grey levels from 0 to 16."""
    from sklearn.datasets import load_digits
    images = load_digits().images
    return images[:, None]


SETS = {"mixture": mixture, "moons": moons, "checkerboard": checkerboard}


def load(name, seed=0, ends=None):
    """A data set by name (digits, mixture, moons, checkerboard) or the path of a .npz file.

    From a file this takes the array `x`, or else the first numeric one of two to four axes:
    (n, D), (n, H, W) or (n, C, H, W). Its smallest and largest numbers become -1 and 1.
    uint8 counts as 256 grey levels: there 0 and 255 become -1 and 1. To measure a model,
    pass the `ends` of the data that it was trained on: then these become -1 and 1.
    ValueError, in one line, where a file cannot be used.
    """
    if name == "digits":
        x = digits()
        levels, own_ends = 17, (0., 16.)
    elif name in SETS:
        x = SETS[name](8192 + HELD_OUT, seed)
        levels, own_ends = None, (-1., 1.)
    else:
        x, levels, own_ends = _read(name)
    ends = tuple(ends or own_ends)
    x = _scaled(name, x, ends)
    x = x[permutation(len(x), seed)]
    held, train = x[:HELD_OUT], x[HELD_OUT:]
    target = ring() if name == "mixture" else None
    return Data(str(name), train, held, levels, ends, target)


def _scaled(name, x, ends):
    """x in float32, on the scale where the ends are -1 and 1."""
    if ends == (-1., 1.):
        return x.astype(np.float32)
    low, high = ends
    with np.errstate(over="ignore"):
        unit = (x.astype(np.float64) - low) / (high - low)
        scaled = (unit * 2 - 1).astype(np.float32)
    if not np.isfinite(scaled).all():
        raise ValueError(f"{name}: values from {x.min():g} to {x.max():g} are too far from "
                         f"the {low:g} to {high:g} that the model was trained on")
    return scaled


def _read(file):
    """(x, levels, ends) of a .npz file: points (n, D) or images (n, C, H, W)."""
    x = _array(file, _arrays(file))
    if not x.size or x.ndim == 2 and x.shape[1] < 2:
        raise ValueError(f"{file}: x of shape {x.shape}; points need two axes or more, "
                         "images pixels")
    if len(x) < 2 * HELD_OUT:
        raise ValueError(f"{file}: {len(x)} samples, at least {2 * HELD_OUT} are needed")
    if not np.isfinite(x).all():
        raise ValueError(f"{file}: holds NaN or inf")
    if x.dtype == np.uint8:
        levels = 256
        low, high = 0., 255.
    else:
        levels = None
        low, high = float(x.min()), float(x.max())
    if low == high:
        raise ValueError(f"{file}: every value is {low:g}")
    if not high - low < np.inf:
        raise ValueError(f"{file}: values from {low} to {high} are too far apart")
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim == 4 and (x.shape[2] % 2 or x.shape[3] % 2):
        raise ValueError(f"{file}: images of {x.shape[2]} by {x.shape[3]}; height and "
                         "width must be even")
    return x, levels, (low, high)


def _arrays(file):
    """The arrays in a .npz file, by name."""
    if not str(file).endswith(".npz"):
        raise ValueError(f"{file}: neither digits, {', '.join(SETS)} nor a .npz file")
    if not Path(file).is_file():
        raise ValueError(f"{file}: no such file")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zipfile.zlib.error) as e:
        raise ValueError(f"{file}: not a readable .npz file ({e})") from e


def _array(file, arrays):
    """`x`, or else the first numeric array of two to four axes."""
    if "x" in arrays:
        arrays = {"x": arrays["x"], **arrays}
    for u in arrays.values():
        if u.dtype.kind in "fiu" and u.ndim in (2, 3, 4):
            return u
    shapes = {name: (u.shape, str(u.dtype)) for name, u in arrays.items()}
    raise ValueError(f"{file}: no numeric array of 2 to 4 axes; it holds {shapes}")
