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
    """train, held: (n, *shape) float32 on the model's scale, where `ends`, two numbers in the
    data's own units, are -1 and 1; levels: grey levels between them, or None."""

    name: str
    train: np.ndarray
    held: np.ndarray
    levels: int | None = None
    ends: tuple = (-1., 1.)

    @property
    def shape(self):
        """One sample's shape."""
        return self.train.shape[1:]

    def quantize(self, x):
        """The grey levels that samples of dequantised data fall into; points pass."""
        if not self.levels:
            return x
        k = np.clip(np.floor((x + 1) * self.levels / 2), 0, self.levels - 1)
        return 2 * k / (self.levels - 1) - 1

    def in_own_units(self, x):
        """Samples on the model's scale in the data's units: grey levels as uint8 where they fit,
        else float64."""
        low, high = self.ends
        x = low + (np.asarray(x, np.float64) + 1) / 2 * (high - low)
        if self.levels and low >= 0 and high < 256:
            return np.clip(np.round(x), low, high).astype(np.uint8)
        return x


def dequantized(x, levels, seed=0, step=0):
    """`likelihood.dequantize` of grey levels in [-1, 1], as a network sees them; points pass."""
    if not levels:
        return x
    u = 1 - noise.uniform(x.shape, seed, step=step, tag=noise.DEQUANTIZATION)
    return dequantize(np.round((x + 1) * (levels - 1) / 2), u, levels)


@lru_cache(maxsize=2)  # an epoch's iterations share one
def _order(n, seed, step=0):
    """A random permutation of n, a function of seed and step."""
    order = np.argsort(noise.words((n,), seed, step=step, tag=noise.ORDER)[:, 0, 0], kind="stable")
    order.flags.writeable = False  # one for all who ask
    return order


def _uniform(shape, seed):
    return noise.uniform(shape, seed, tag=noise.DATA)


def mixture(n, seed):
    """Eight Gaussians of deviation .05 on a circle of radius .8."""
    angle = 2 * np.pi * np.arange(8) / 8
    means = .8 * np.stack((np.cos(angle), np.sin(angle)), 1)
    return Mixture(np.ones(8), means, .05**2).sample(n, seed)


def moons(n, seed):
    """Two half circles, one in the other's arms, with noise."""
    u, z = _uniform((n, 2), seed), noise.normal((n, 2), seed, tag=noise.CHOICE)
    angle, upper = np.pi * u[:, 0], u[:, 1] < .5
    x = np.where(upper, np.cos(angle), 1 - np.cos(angle)) - .5
    y = np.where(upper, np.sin(angle), .5 - np.sin(angle)) - .25
    return (np.stack((x, y), 1) + .05 * z) * .55


def checkerboard(n, seed):
    """The eight dark squares of a four by four board on [-1, 1]^2."""
    u = _uniform((n, 3), seed)
    square = np.minimum((8 * u[:, 2]).astype(int), 7)
    row, column = square // 2, 2 * (square % 2) + square // 2 % 2
    return (np.stack((column, row), 1) + u[:, :2]) / 2 - 1


def digits():
    """scikit-learn's 1,797 handwritten digits, 8 by 8, 17 grey levels from 0 to 16."""
    from sklearn.datasets import load_digits
    return load_digits().images[:, None]


SETS = {"mixture": mixture, "moons": moons, "checkerboard": checkerboard}


def load(name, seed=0, ends=None):
    """A data set by name (digits, mixture, moons, checkerboard) or the path of a .npz file.

    A file's array `x`, or else its first numeric one of two or more axes, (n, D), (n, H, W) or
    (n, C, H, W), is scaled: its smallest and largest numbers become -1 and 1, or else what `ends`
    names, of the file a model was trained on: only on the model's own scale can it be measured.
    uint8 counts as 256 grey levels. ValueError in one line where a file cannot be used.
    """
    if name == "digits":
        x, levels, own = digits(), 17, (0., 16.)
    elif name in SETS:
        x, levels, own = SETS[name](8192 + HELD_OUT, seed), None, (-1., 1.)
    else:
        x, levels, own = _read(name)
    ends = tuple(ends or own)
    x = _scaled(name, x, ends)[_order(len(x), seed)]
    return Data(str(name), x[HELD_OUT:], x[:HELD_OUT], levels, ends)


def _scaled(name, x, ends):
    """x on the scale where ends are -1 and 1, float32."""
    if ends == (-1., 1.):
        return x.astype(np.float32)
    low, high = ends
    with np.errstate(over="ignore"):
        scaled = ((x.astype(np.float64) - low) / (high - low) * 2 - 1).astype(np.float32)
    if not np.isfinite(scaled).all():
        raise ValueError(f"{name}: values from {x.min():g} to {x.max():g} are too far from the "
                         f"{low:g} to {high:g} that the model was trained on")
    return scaled


def _read(file):
    if not str(file).endswith(".npz"):
        raise ValueError(f"{file}: neither digits, {', '.join(SETS)} nor a .npz file")
    if not Path(file).is_file():
        raise ValueError(f"{file}: no such file")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {k: arrays[k] for k in arrays.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zipfile.zlib.error) as e:
        raise ValueError(f"{file}: not a readable .npz file ({e})") from e
    found = {k: found[k] for k in sorted(found, key=lambda k: k != "x")}  # x first
    good = [v for v in found.values() if v.dtype.kind in "fiu" and v.ndim in (2, 3, 4)]
    if not good:
        raise ValueError(f"{file}: no numeric array of 2 to 4 axes; it holds "
                         f"{ {k: (v.shape, str(v.dtype)) for k, v in found.items()} }")
    x = good[0]
    if not x.size or x.ndim == 2 and x.shape[1] < 2:
        raise ValueError(f"{file}: x of shape {x.shape}; points need two axes or more, images "
                         "pixels")
    if len(x) < 2 * HELD_OUT:
        raise ValueError(f"{file}: {len(x)} samples, at least {2 * HELD_OUT} are needed")
    if not np.isfinite(x).all():
        raise ValueError(f"{file}: holds NaN or inf")
    levels, low, high = (256, 0, 255) if x.dtype == np.uint8 else (None, x.min(), x.max())
    low, high = float(low), float(high)
    if not 0 < high - low < np.inf:
        raise ValueError(f"{file}: every value is {low:g}" if low == high else
                         f"{file}: values from {low} to {high} are too far apart")
    x = x[:, None] if x.ndim == 3 else x
    if x.ndim == 4 and (x.shape[2] % 2 or x.shape[3] % 2):
        raise ValueError(f"{file}: images of {x.shape[2]} by {x.shape[3]}; height and width "
                         "must be even")
    return x, levels, (low, high)
