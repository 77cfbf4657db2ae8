"""A lean noise-conditional score network: one constructor for images and for vectors."""

import math
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from .predictions import c_in, inverse, preconditioned


@contextmanager
def usual_defaults():
    """Inside this context, torch makes float32 tensors on the CPU unless told otherwise.

    A user's defaults are for the user's own tensors. They change no bit of a network.
    """
    dtype = torch.get_default_dtype()
    device = torch.get_default_device()
    on_cpu = nullcontext() if device.type == "cpu" else torch.device("cpu")
    torch.set_default_dtype(torch.float32)
    try:
        with on_cpu:
            yield
    finally:
        torch.set_default_dtype(dtype)


PLACES = 64  # at the lowest resolution of an image, or fewer
REACH = 5  # places in a row that two blocks, four convolutions, see from end to end
EQUAL_ROWS = 8  # for one noise level: a product of 1 to 3 rows has other bits than of more


def per_sample(u, x):
    """A row of u for each sample of x: its own, or the first of one noise level's."""
    return u if len(u) == len(x) else u[:1]


class Condition(nn.Module):
    """The conditioning vector e: cosines and sines of c_noise, then two small layers.

    Where samples have classes, a vector for each class is added between the layers. There
    is one more, for samples whose class is not told.
    """

    def __init__(self, width, classes=0, n_freq=16):
        super().__init__()
        cycles = torch.logspace(-1, 1, n_freq, base=4.0)
        self.register_buffer("freq", math.pi * cycles)
        self.fc1 = nn.Linear(2 * n_freq, width)
        self.fc2 = nn.Linear(width, width)
        if classes:
            self.label = nn.Parameter(torch.zeros(classes + 1, width))

    def forward(self, c_noise, label=None):
        """c_noise: (rows,); label: (rows,), or None without classes. Returns e: (rows,
        width)."""
        phase = c_noise[:, None] * self.freq
        e = self.fc1(torch.cat([phase.cos(), phase.sin()], dim=1))
        if label is not None:
            e = e + self.label[label]
        return F.silu(self.fc2(F.silu(e)))


class DenseBlock(nn.Module):
    """h + W2 silu((1 + scale(e)) W1 norm(h) + shift(e))."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.cond = nn.Linear(width, 2 * width)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, h, e):
        """h: (B, width), e: (rows, width) as in `per_sample`. Returns the next h."""
        scale, shift = per_sample(self.cond(e), h).chunk(2, dim=1)
        r = self.fc1(self.norm(h))
        return h + self.fc2(F.silu((1 + scale) * r + shift))


class VectorNet(nn.Module):
    """F_x on vectors: a residual multilayer perceptron."""

    def __init__(self, shape, classes=0, width=128, depth=3):
        super().__init__()
        self.embed = Condition(width, classes)
        self.inp = nn.Linear(shape[0], width)
        self.blocks = nn.ModuleList(DenseBlock(width) for _ in range(depth))
        self.out = nn.Linear(width, shape[0])

    def forward(self, x, *condition):
        """x: (B, D), condition: as `Condition` takes it. Returns F_x: (B, D)."""
        e = self.embed(*condition)
        h = self.inp(x)
        for block in self.blocks:
            h = block(h, e)
        return self.out(F.silu(h))


class ConvBlock(nn.Module):
    """h + conv(silu((1 + scale(e)) norm(conv(silu(norm(h)))) + shift(e)))."""

    def __init__(self, width, emb):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, width)
        self.norm2 = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.cond = nn.Linear(emb, 2 * width)

    def forward(self, h, e):
        """h: (B, width, H, W), e: (rows, emb) as in `per_sample`. Returns the next h."""
        scale, shift = per_sample(self.cond(e), h)[..., None, None].chunk(2, dim=1)
        r = self.conv1(F.silu(self.norm1(h)))
        r = self.norm2(r)
        return h + self.conv2(F.silu((1 + scale) * r + shift))


class SelfAttention(nn.Module):
    """h + W softmax(q k^T / sqrt(d)) v: every place of an image asks all others.

    A convolution sees its neighbours alone; a shape is in how far places fit together.
    q, k and v are linear in norm(h), and each head has d channels of them.
    [Vaswani et al. 2017]
    """

    def __init__(self, width, heads=4):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, h):
        """h: (B, width, H, W). Returns the next h."""
        B, width, H, W = h.shape
        qkv = self.qkv(self.norm(h)).reshape(B, 3, self.heads, width // self.heads, H * W)
        q, k, v = qkv.unbind(1)
        d = q.shape[2]
        weights = torch.softmax(q.transpose(2, 3) @ k / d**.5, dim=-1)  # (.., to, from)
        r = v @ weights.transpose(2, 3)
        return h + self.out(r.reshape(B, width, H, W))


def channels_at(height, width):
    """The channels of an image's resolutions, from its own to the lowest, each half of it.

    It is halved once at least, and until it has PLACES or fewer; one that is long and thin
    is padded, and keeps more. Each time the channels double, so that all convolutions cost
    the same; 192 are the most.

    Example:
        >>> print(channels_at(8, 8), channels_at(28, 28), channels_at(64, 48))
        [48, 96] [24, 48, 96] [24, 48, 96, 192]
    """
    halvings = max(1, math.ceil(math.log2(height * width / PLACES) / 2))
    first = max(24, 96 >> halvings)
    return [min(192, first << k) for k in range(halvings + 1)]


class ImageNet(nn.Module):
    """F_x on images: a U of resolutions, by `channels_at`.

    On the way down every resolution has a block before it is halved. On the way up it is
    added to what comes from below, and has another. A learned map, added after the first
    convolution, tells every pixel where it is. Where the two lowest blocks do not reach
    from end to end, attention between them does. An image whose sides do not divide is
    padded with zeros, which are cut off at the end.
    """

    def __init__(self, shape, classes=0):
        super().__init__()
        channels, *sides = shape
        widths = channels_at(*sides)
        low = widths[-1]
        pairs = [*zip(widths, widths[1:])]
        halved = [-(-side >> len(pairs)) for side in sides]  # rounded up
        padded = [side << len(pairs) for side in halved]
        self.padding = [more - side for side, more in zip(sides, padded)]
        self.embed = Condition(low, classes)
        self.inp = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.place = nn.Parameter(0.1 * torch.randn(1, widths[0], *padded))
        self.enter = nn.ModuleList(ConvBlock(high, low) for high, _ in pairs)
        self.leave = nn.ModuleList(ConvBlock(high, low) for high, _ in pairs)
        self.down = nn.ModuleList(nn.Conv2d(high, half, 2, stride=2)
                                  for high, half in pairs)
        self.low1 = ConvBlock(low, low)
        self.mix = SelfAttention(low) if max(halved) > REACH else nn.Identity()
        self.low2 = ConvBlock(low, low)
        self.up = nn.ModuleList(nn.ConvTranspose2d(half, high, 2, stride=2)
                                for high, half in pairs)
        self.norm = nn.GroupNorm(8, widths[0])
        self.out = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, x, *condition):
        """x: (B, channels, H, W), condition: as `Condition` takes it. Returns F_x, shaped
        like x."""
        e = self.embed(*condition)
        below, right = self.padding
        h = self.inp(F.pad(x, (0, right, 0, below))) + self.place
        kept = []
        for enter, down in zip(self.enter, self.down):
            h = enter(h, e)
            kept.append(h)
            h = down(h)
        h = self.low1(h, e)
        h = self.mix(h)
        h = self.low2(h, e)
        for leave, up in zip(reversed(self.leave), reversed(self.up)):
            h = leave(kept.pop() + up(h), e)
        h = self.out(F.silu(self.norm(h)))
        return h[..., :x.shape[2], :x.shape[3]]


class ScoreNet(nn.Module):
    """The score s(x, sigma) of data blurred by N(0, sigma^2), by EDM's preconditioning.

    The inner network F_x(c_in x; c_noise) with c_noise = ln(sigma) / 4 has an input and a
    target of unit variance. It returns `predictions.preconditioned`, whose inverse gives
    the score. [EDM eq. 7 and table 1]

    shape is one sample's: (D,) for vectors, (channels, H, W) for images. With `classes` it
    knows the score s(x, sigma | y) of each class y = 0 ... classes - 1 besides, and begins
    with the weights that it has without.
    """

    def __init__(self, shape, sigma_data=.5, classes=0, **options):
        super().__init__()
        self.sigma_data = sigma_data
        self.classes = classes
        network = VectorNet if len(shape) == 1 else ImageNet
        self.F_x = network(shape, classes, **options)
        nn.init.zeros_(self.F_x.out.weight)
        nn.init.zeros_(self.F_x.out.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, x, sigma, label=None):
        """The score of x, shaped like it.

        x: (B, *shape); sigma: (B,), or (1,) for all; label: the class of each sample, int64
        (B,), or (1,) for all. The label `classes` and None are those of samples whose class
        is not told. ValueError for other lengths. What follows from one sigma and label
        alone is computed on EQUAL_ROWS rows: its bits are those of any batch, and its cost
        is small.
        """
        if self.classes and label is None:
            label = torch.full((1,), self.classes, device=x.device)
        given = {"sigma": sigma} if label is None else {"sigma": sigma, "label": label}
        for name, u in given.items():
            if len(u) not in (1, len(x)):
                raise ValueError(f"{name} has {len(u)} rows: one, or one for each of the "
                                 f"{len(x)} samples")
        several = any(len(u) > 1 for u in given.values())
        sigma, *label = [u.expand(len(x) if several else EQUAL_ROWS)
                         for u in given.values()]
        column = per_sample(sigma, x).reshape(-1, *[1] * (x.dim() - 1))
        F_x = self.F_x(c_in(column, self.sigma_data) * x, sigma.log() / 4, *label)
        score = inverse(preconditioned)
        return score(x, F_x, a=1., sigma=column, sigma_data=self.sigma_data)
