"""Data sets as arrays within [-1, 1]: handwritten digits, three 2-D sets, any .npz file."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

import numpy as np

from . import noise, npz
from .likelihood import dequantize
from .targets import Mixture
from .terminal import printable

HELD_OUT = 5  # of so many samples one is held out
POINTS = 10_240  # of a set that is drawn
FEWEST = 50  # samples to train on, and samples held out
TURNS = 8  # of rows and of columns that permute the samples


@dataclass(frozen=True)
class Data:
    """A data set on the model's scale.

    train, held: (n, *shape) float32 arrays.
    labels: the class of each training sample, whole numbers from 0 on, where it is known;
        held_labels: those of held-out samples; classes: what the data call them.
    levels: how many grey levels there are, or None for points.
    ends: the two numbers, in the data's own units, that became -1 and 1.
    target: the distribution that it was drawn from, where one is known.
    digest: of all its numbers, in any order: what the data set is, whatever its name.
    split: how samples were held out, "by hash" or "in" a test array.
    about: what was read, in words.
    """

    name: str
    train: np.ndarray
    held: np.ndarray
    levels: int | None = None
    ends: tuple = (-1., 1.)
    target: Mixture | None = None
    digest: str = ""
    split: str = npz.BY_HASH
    about: str = ""
    labels: np.ndarray | None = None
    held_labels: np.ndarray | None = None
    classes: tuple = ()

    @property
    def shape(self):
        """One sample's shape."""
        return self.train.shape[1:]

    def counts(self):
        """{class: how many training samples are of it}, by what the data call it."""
        number = np.bincount(self.labels, minlength=len(self.classes))
        return dict(zip(self.classes, number.tolist()))

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

        Returns float64; for grey levels that are whole numbers the smallest integer dtype
        that holds them, uint8 for 0 to 255.
        """
        low, high = self.ends
        x = low + (np.asarray(x, np.float64) + 1) / 2 * (high - low)
        if not self.levels:
            return x
        step = (high - low) / (self.levels - 1)
        x = low + step * np.clip(np.round((x - low) / step), 0, self.levels - 1)
        if step != 1 or low != int(low):
            return x
        for dtype in (np.uint8, np.int8, np.uint16, np.int16):
            if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
                return x.astype(dtype)
        return x.astype(np.int64)


def dequantized(x, levels, seed=0, sample=0, step=0):
    """What a network sees: `likelihood.dequantize` of grey levels in [-1, 1], with noise.

    seed, sample, step: of the noise, as in `noise.words`. Points pass unchanged.
    """
    if not levels:
        return x
    u = 1 - noise.uniform(x.shape, seed, sample, step, tag=noise.DEQUANTIZATION)
    k = np.round((x + 1) * (levels - 1) / 2)
    return dequantize(k, u, levels)


@lru_cache(maxsize=2)  # an epoch's iterations share one
def _turns(n, seed, step):
    """(columns, rows, turns) of a grid of at least n cells.

    turns: pairs of random numbers, one for each row and one for each column.
    """
    columns = isqrt(n - 1) + 1
    rows = -(-n // columns)  # at most as many
    words = noise.words((columns, TURNS), seed, step=step, tag=noise.ORDER)
    words = words.reshape(columns, TURNS).T.copy()
    return columns, rows, words.reshape(-1, 2, columns)


def permuted(i, n, seed, step=0):
    """Where a random permutation of 0 ... n-1, a function of seed and step, has i.

    i: an array of indices. No others are computed: the cost does not grow with n, but for
    its square root once a permutation. A Feistel network [Luby & Rackoff 1988]: the indices
    fill a grid, and by turns each row is rotated by a random number of its own, and each
    column. All that maps the grid to itself. What leaves the n cells goes on until it is
    back.

    Example:
        >>> print(sorted(permuted(np.arange(7), 7, seed=1).tolist()))
        [0, 1, 2, 3, 4, 5, 6]
    """
    columns, rows, turns = _turns(n, seed, step)

    def turned(i):
        row, column = np.divmod(i, columns)
        for across, along in turns:
            column = (column + across[row]) % columns
            row = (row + along[column]) % rows
        return row * columns + column

    i = turned(i)
    while (outside := i >= n).any():
        i[outside] = turned(i[outside])
    return i


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
    """scikit-learn's 1,797 handwritten digits, 8 by 8, 17 grey levels from 0 to 16.

    Returns (images, labels): (n, 1, 8, 8) and (n,).
    """
    from sklearn.datasets import load_digits
    found = load_digits()
    return found.images[:, None], found.target


SETS = {"mixture": mixture, "moons": moons, "checkerboard": checkerboard}


def load(name, seed=0, ends=None, levels=None):
    """A data set by name (digits, mixture, moons, checkerboard) or the path of a .npz file.

    Of a file, `npz.choose` says which array is trained on: (n, D), (n, H, W), (n, C, H, W)
    or (n, H, W, C). Pixels have grey levels (`npz.grey_levels`), and the first and last of
    these become -1 and 1; of other numbers the smallest and the largest do.
    To measure a model, pass the `ends` and `levels` of the data that it was trained on.

    A test array in the file is held out, but for samples that are trained on too. Without
    one, a sample is held out where `sample_keys` is below a fifth of its range: in every
    file that holds this sample, in whatever order. Sets that are drawn follow from `seed`.
    ValueError, in one line, where a file cannot be used.
    """
    source = _source(name, seed)
    measures = ends is not None  # a model; else the data are to train one
    if measures:
        npz.require_levels(name, source, levels, ends)
    elif name in SETS:
        ends = -1., 1.
    else:
        levels, ends = npz.scale(name, source)
    ends = float(ends[0]), float(ends[1])
    train, held, keys, note = _split(source, levels, ends)
    if min(len(train), len(held)) < FEWEST and not measures:
        raise ValueError(f"{name}: {len(train)} samples to train on and {len(held)} held "
                         f"out{note}; at least {FEWEST} of each are needed")
    about = (f"{name}: {source.what}; {len(train)} samples to train on, {len(held)} held "
             f"out {source.split}{note}")
    if levels:
        about += f"; {levels} grey levels from {ends[0]:g} to {ends[1]:g}"
    shape = source.x.shape[1:]
    digest = hashlib.sha256(f"{shape}".encode() + keys.tobytes()).hexdigest()
    target = ring() if name == "mixture" else None
    test = source.x if source.test is None else source.test
    of_test = source.labels if source.test is None else source.test_labels
    labels = None if source.labels is None else source.labels[train]
    held_labels = None if of_test is None else of_test[held]
    train = _scaled(name, source.x, train, levels, ends)
    held = _scaled(name, test, held, levels, ends)
    return Data(str(name), train, held, levels, ends, target, digest, source.split,
                printable(about), labels, held_labels, source.classes)


def _split(source, levels, ends):
    """(train, held, keys, note): which samples are on either side, in the order of `keys`.

    train, held: indices, held's into the test array where there is one. A sample that is
    trained on is not held out. note: what to say of it.
    """
    order, keys = _in_order(source.x, levels, ends)
    if source.test is None:
        n = np.searchsorted(keys, np.uint64(2**64 // HELD_OUT))
        few = len(np.unique(keys)) < len(keys) // 2
        return order[n:], order[:n], keys, " (equal samples stay together)" if few else ""
    order_of_test, keys_of_test = _in_order(source.test, levels, ends)
    seen = np.isin(keys_of_test, keys)
    end = np.uint64([2**64 - 1])  # so that it matters where the test begins
    keys = np.concatenate((keys, end, keys_of_test))
    note = f", but for {seen.sum()} that are trained on" if seen.any() else ""
    return order, order_of_test[~seen], keys, note


def _source(name, seed):
    """The `npz.Source` of a data set."""
    if name in SETS:
        return npz.Source(SETS[name](POINTS, seed), f"{POINTS} points")
    if name == "digits":
        images, labels = digits()
        return npz.Source(images, "8 by 8 pixels, 10 classes", labels=labels,
                          classes=tuple("0123456789"))
    if str(name).endswith(".npz"):
        return npz.source(name)
    raise ValueError(f"{name}: neither digits, {', '.join(SETS)} nor a .npz file")


def sample_keys(x, levels=None, ends=(-1., 1.)):
    """A number of 64 bits for each sample, a hash of its values: (n,) uint64.

    It names the sample in every file, whatever its place and dtype. Pixels have that of
    their grey levels, so that it matters not whether they were divided; other numbers that
    of their float64 values.
    """
    keys = np.empty(len(x), np.uint64)
    done = 0
    for rows in npz.chunks(x):
        if levels:
            rows = np.round(npz.level_of(rows, levels, *ends))
        values = np.ascontiguousarray(rows, "<f8").reshape(len(rows), -1)
        values = values + 0.  # of -0 and 0 it makes one
        for row in values:
            digest = hashlib.blake2b(row, digest_size=8).digest()
            keys[done] = int.from_bytes(digest, "little")
            done += 1
    return keys


def _in_order(x, levels, ends):
    """(order, keys): samples sorted by their keys, whatever order the file has."""
    keys = sample_keys(x, levels, ends)
    order = np.argsort(keys, kind="stable")
    return order, keys[order]


def _scaled(name, x, order, levels, ends):
    """The samples x[order] in float32, on the scale where the ends are -1 and 1."""
    low, high = ends
    scaled = np.empty((len(order), *x.shape[1:]), np.float32)
    done = 0
    for chosen in npz.chunks(order, max(1, (1 << 20) // x[0].size)):
        rows = x[chosen].astype(np.float64)
        if levels:
            rows = np.round(npz.level_of(rows, levels, low, high)) / (levels - 1) * 2 - 1
        elif ends != (-1., 1.):
            rows = (rows - low) / (high - low) * 2 - 1
        into = scaled[done:done + len(rows)]
        with np.errstate(over="ignore"):
            into[:] = rows
        if not np.isfinite(into).all():
            raise ValueError(f"{name}: values from {x.min():g} to {x.max():g} are too far "
                             f"from the {low:g} to {high:g} that the model was trained on")
        done += len(rows)
    return scaled
