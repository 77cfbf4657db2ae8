"""What samples are asked for: their classes, how strongly, and what is known of them."""

from functools import partial
from math import prod

import numpy as np
import torch

from . import noise, npz
from .families import SIGMA_MIN
from .guidance import Pair, guide, guided, posterior
from .likelihood import dequantize

LABELS = 1 << 20  # that are named at a time
FAR = 10.  # from the data, which lie in [-1, 1]
EXACT = 8  # coordinates of a sample at most, for the covariance of each by itself


def as_tensor(u, shape, device):
    """(B, D) numbers as a float32 tensor (B, *shape)."""
    return torch.tensor(u, dtype=torch.float32, device=device).reshape(-1, *shape)


def as_points(u):
    """A tensor (B, *shape) as a float64 array (B, D)."""
    return u.flatten(1).double().cpu().numpy()


def of_points(score, shape, device):
    """A score(x, t) of tensors as one of (B, D) float64 arrays."""
    return lambda x, t: as_points(score(as_tensor(x, shape, device), t))


def linearized(score, shape, device):
    """A score(x, t) of tensors as `likelihood.with_trace` takes it: of (B, D) float64
    arrays, with its products with a vector from the left."""
    def linearize(x, t):
        s, vjp = torch.func.vjp(lambda x: score(x, t), as_tensor(x, shape, device))

        def product(v):
            gradient, = vjp(as_tensor(v, shape, device))
            return as_points(gradient)

        return as_points(s), product

    return linearize


class Conditions:
    """How a network's score becomes the one that samples are asked to follow.

    classes: {name: how often it is wanted} of a network's classes, or None where it has
        none; label: the name of the only one that is wanted. w: the guidance of
        `guidance.guided`.
    known: what is known of samples, (k, *shape) in the network's units, NaN elsewhere, or
        None. Sample i completes row i mod k. noise_std: how uncertain it is. The network
        is then told no class but `label`: which one it is follows from what is known.
    sigma_data: the network's, of which `guidance.posterior` makes a covariance where a
        sample has more than EXACT numbers.
    """

    def __init__(self, classes=None, label=None, w=1., *, known=None, noise_std=0.,
                 sigma_data=.5):
        self.names = tuple(classes or ())
        shares = [*(classes or {}).values()]
        if label:
            shares = [name == label for name in self.names]
        unnamed = label is None and known is not None
        self.told = bool(shares) and w != 0 and not unnamed
        self.shares = np.cumsum(shares) / max(1, np.sum(shares))
        self.w = w
        self.known = known
        self.noise_std = noise_std
        self.sigma_data = sigma_data

    def labels(self, rows, seed=0, sample=0):
        """The class of each sample, (rows,); None where none is told. seed, sample: as in
        `noise.normal`."""
        if not self.told:
            return None
        u = noise.uniform((rows,), seed, sample, tag=noise.CHOICE)
        return np.searchsorted(self.shares[:-1], u)

    def in_words(self, n, seed):
        """The names of n samples' classes, in parts; seed: a number, or one a sample."""
        names = np.array(self.names)
        for first in range(0, n, LABELS):
            rows = min(LABELS, n - first)
            own = (seed, first) if isinstance(seed, int) else (seed[first:first + rows], 0)
            yield names[self.labels(rows, *own)]

    def of_rows(self, first, rows):
        """What is known of the samples from the id `first` on, (rows, *shape)."""
        return self.known[np.arange(first, first + rows) % len(self.known)]

    def __call__(self, score, engine, first, rows):
        """(score, engine) of the samples from the id `first` on, for any family that is not
        coupled by the batch.

        score(x, sigma, label=None): a network's.
        """
        told = score
        label = self.labels(rows, engine.seed, engine.sample)
        if label is not None:
            told = partial(score, label=label)
        w = self.w if self.told else 1.
        followed, engine_of_pairs = guide(score, told, w, engine)
        if self.known is None:
            return followed, engine_of_pairs

        def whole(x, sigma):
            s = followed(x, sigma)
            return guided(*s.both, w) if isinstance(s, Pair) else s

        return self._completing(whole, self.of_rows(first, rows)), engine

    def _completing(self, score, known):
        """The score given what is known, by `guidance.posterior`, of tensors."""
        shape = known.shape[1:]
        few = prod(shape) <= EXACT

        def given(x, sigma):
            in_numpy = posterior(linearized(score, shape, x.device),
                                 known.reshape(len(known), -1), lambda s: (1., s),
                                 noise_std=self.noise_std,
                                 sigma_data=None if few else self.sigma_data)
            s = in_numpy(x.flatten(1).double().cpu().numpy(), sigma)
            return x.new_tensor(s).reshape(x.shape)

        return given

    def completed(self, parts):
        """Successive samples, from the first on, with what is known in its place."""
        first = 0
        for x in parts:
            if self.known is not None:
                known = self.of_rows(first, len(x))
                x = np.where(known == known, known, x).astype(x.dtype)
            first += len(x)
            yield x


def as_seen(x, levels):
    """(y, std): what a network sees of samples x in [-1, 1], a new array, and how uncertain
    it is. A grey level is the middle of the values that `data.dequantized` makes of it. A
    point is as uncertain as the noise that samplers leave.
    """
    if not levels:
        return x.copy(), SIGMA_MIN
    k = np.round((x + 1) * (levels - 1) / 2)
    return dequantize(k, .5, levels), 2 / levels / 12**.5


def known_parts(file, shape, levels, ends):
    """`as_seen` of a file of samples (k, *shape) that are NaN where nothing is known.

    ends: the two numbers of the file that are the model's -1 and 1. ValueError, in one
    line, where the file is of something else.
    """
    member = npz.choose(file, npz.contents(file)).train
    x = npz.as_images(npz.read(file, member)).astype(np.float64)
    if x.shape[1:] != tuple(shape) or not len(x):
        raise ValueError(f"{file}: {member}; the model's samples are (n, "
                         f"{', '.join(map(str, shape))})")
    if np.isinf(x).any():
        raise ValueError(f"{file}: {member.name} holds inf")
    if not np.isnan(x).any():
        raise ValueError(f"{file}: {member.name} has no NaN, so nothing is unknown")
    x = npz.level_of(x, 2, *ends) * 2 - 1
    if levels and (abs(x) >= levels / (levels - 1)).any():
        raise ValueError(f"{file}: {member.name} has values outside {ends[0]:g} to "
                         f"{ends[1]:g}, those of the model; see --units")
    if (abs(x) > FAR).any():
        row = np.argmax((abs(x) > FAR).reshape(len(x), -1).any(1))
        raise ValueError(f"{file}: row {row} of {member.name} is far outside "
                         f"{ends[0]:g} to {ends[1]:g}, where the model's data are; see "
                         "--units")
    return as_seen(x, levels)
